"""Which weights to keep: pure functions of tensors.

Scores are Wanda's (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models",
equation 1): |W[o, i]| times the L2 norm of input i over the calibration tokens, compared within a row o.
"""

import torch
from torch import Tensor


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """[O, I] float32 importance of `weight` [O, I] under the input norms [I]."""
    return weight.detach().float().abs() * norms.float()


def keep_rows(scores: Tensor, sparsity: float) -> Tensor:
    """[O, I] bool: each row keeps all but its floor(I * sparsity) smallest scores; ties drop the first."""
    drop = int(scores.shape[1] * sparsity)
    keep = torch.ones_like(scores, dtype=torch.bool)
    lowest = torch.argsort(scores, dim=1, stable=True)[:, :drop]
    return keep.scatter_(1, lowest, False)


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """[O, I] bool: of every `m` inputs in a row the `n` with the largest scores; ties drop the first.

    I must be a multiple of m. 2:4 is what sparse tensor cores take (Mishra et al. 2021).
    """
    outputs, inputs = scores.shape
    assert inputs % m == 0, f"{inputs} inputs are no multiple of {m}"
    return keep_rows(scores.reshape(-1, m), (m - n + 0.5) / m).reshape(outputs, inputs)
