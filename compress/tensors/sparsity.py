"""Which weights to keep: pure functions of tensors.

Scores are magnitudes, or Wanda's (Sun et al. 2023, "A Simple and Effective Pruning Approach for Large
Language Models", equation 1): |W[o, i]| times the L2 norm of input i over the calibration tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Rule:
    """How many weights of a matrix stay: all but a share, or n of every m inputs of a row."""

    sparsity: float
    pattern: tuple[int, int] | None = None  # n, m

    def keep(self, scores: Tensor, whole: bool) -> Tensor:
        """[O, I] bool: the weights that stay.

        Args:
            whole: a share is taken of the whole matrix, not of each row.
        """
        if self.pattern is not None:
            return keep_n_of_m(scores, *self.pattern)
        if whole:
            return keep_rows(scores.reshape(1, -1), self.sparsity).reshape(scores.shape)
        return keep_rows(scores, self.sparsity)


def outlier_share(scores: Sequence[Tensor], times: float) -> float:
    """Share of the Wanda scores of a layer above `times` their mean: its outliers (Yin et al. 2024)."""
    flat = torch.cat([score.flatten() for score in scores]).double()
    return float((flat > times * flat.mean()).double().mean())


def owl_sparsity(
    outliers: Sequence[float], weights: Sequence[int], sparsity: float, reach: float
) -> list[float]:
    """The sparsity of each layer by OWL (Yin et al. 2024, arXiv:2310.05175): less where outliers are many.

    Densities are linear in the share of outliers, `2 reach` from the least to the most, and such that all
    layers together have the sparsity asked for.

    Args:
        weights: number of weights of each layer.
    """
    low, high = min(outliers), max(outliers)
    density = [2 * reach * (share - low) / (high - low) if high > low else 0.0 for share in outliers]
    mean = sum(d * n for d, n in zip(density, weights, strict=True)) / sum(weights)
    return [sparsity - (d - mean) for d in density]
