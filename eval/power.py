"""Power of the crossed test: what a pilot's mean squares say about the seeds and documents to plan for."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import nctdtr

from eval.statistics import MeanSquares, crossed_variance, mean_products, t_quantile

MOST_SEEDS, MOST_DOCUMENTS = 200, 1_000_000


@dataclass(frozen=True)
class Components:
    """Variance of one entry of a crossed table, by origin."""

    seeds: float
    documents: float
    residual: float

    def mean_squares(self, s: int, c: int) -> MeanSquares:
        """Expected mean squares of a table of `s` seeds by `c` documents (Cornfield and Tukey 1956)."""
        parts = self.residual + c * self.seeds, self.residual + s * self.documents, self.residual
        return MeanSquares(*(np.asarray(part, float) for part in parts))


def components(z: ArrayLike) -> Components:
    """Method-of-moments estimates from a pilot table [S, C], S, C >= 2; negative ones count as 0."""
    s, c = np.shape(z)
    ms = mean_products(z, z)
    seeds, documents = (ms.seeds - ms.residual) / c, (ms.documents - ms.residual) / s
    return Components(max(float(seeds), 0.0), max(float(documents), 0.0), float(ms.residual))


def power(parts: Components, effect: float, s: int, c: int, alpha: float) -> float:
    """Chance of a lower bound above 0 at level `alpha` when the true mean is `effect`: noncentral t."""
    variance, nu = crossed_variance(parts.mean_squares(s, c), s, c)
    if variance == 0:
        return 0.0
    shift = effect / float(np.sqrt(variance))
    if abs(shift) > 30:  # where the noncentral t underflows; the answer is certain
        return float(shift > 0)
    return 1 - float(nctdtr(nu, shift, t_quantile(alpha, float(nu))))


def seeds_for(parts: Components, effect: float, c: int, alpha: float, goal: float = 0.8) -> int | None:
    """Least number of seeds with power `goal` on `c` documents; None where 200 are too few."""
    return _least(2, MOST_SEEDS, lambda s: power(parts, effect, s, c, alpha) >= goal)


def documents_for(parts: Components, effect: float, s: int, alpha: float, goal: float = 0.8) -> int | None:
    """Least number of documents with power `goal` at `s` seeds; None where a million are too few."""
    return _least(2, MOST_DOCUMENTS, lambda c: power(parts, effect, s, c, alpha) >= goal)


def _least(low: int, high: int, enough: Callable[[int], bool]) -> int | None:
    """Bisection for the least n in [low, high] that is enough; power grows with n."""
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
