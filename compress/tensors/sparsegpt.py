"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): weights pruned, and the others corrected for it.

A layer's squared error is quadratic in its weights, with the Hessian X'X of its inputs. Its columns are gone
through from left to right; the weights to the right make up for a pruned one, as Optimal Brain Surgeon
gives it (Hassibi and Stork 1993). The upper Cholesky factor of the inverse Hessian holds what every column
needs: row j times its diagonal is the first row of the inverse of the Hessian without the columns before j.
"""

import torch
from torch import Tensor

from compress.tensors.sparsity import Rule

BLOCK = 128  # columns whose mask is chosen together
DAMPING = 0.01  # of the mean of the diagonal, added to it


def sparsegpt(weight: Tensor, hessian: Tensor, rule: Rule, block: int = BLOCK) -> Tensor:
    """[O, I] the pruned and corrected weights of a layer.

    Args:
        weight: [O, I].
        hessian: [I, I], the sum of x x' over the inputs x of calibration tokens.
        rule: a share of zeros in each block of columns, or n of every m inputs of a row.
    """
    w, h = weight.detach().double().clone(), hessian.to(weight.device).double()
    dead = h.diagonal() == 0
    w[:, dead] = 0  # an input that is never other than zero
    h = h + torch.diag(dead + DAMPING * h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    if rule.pattern is not None:  # a block holds whole groups
        block = max(rule.pattern[1], block - block % rule.pattern[1])
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        part, own = w[:, start:end], factor[start:end, start:end]
        errors = torch.zeros_like(part)
        keep = torch.ones_like(part, dtype=torch.bool)
        group = end - start if rule.pattern is None else rule.pattern[1]
        for j in range(end - start):
            if j % group == 0:  # by the weights as those before have left them
                inside = slice(j, j + group)
                scores = (part[:, inside] / own.diagonal()[inside]).square()
                keep[:, inside] = rule.keep(scores, whole=True)
            errors[:, j] = torch.where(keep[:, j], 0.0, part[:, j] / own[j, j])
            part[:, j:] -= errors[:, j, None] * own[j, j:]
            part[:, j] = torch.where(keep[:, j], part[:, j], 0.0)  # to the last bit
        w[:, end:] -= errors @ factor[start:end, end:]
    return w.to(weight.dtype)
