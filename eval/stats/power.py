"""Power of the crossed test: what a pilot's mean squares say about the seeds and documents to plan for.

Every function takes single values or arrays of them: the variances of a pilot are themselves uncertain, so
what follows from them is worked out for many draws at once.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtr, chdtri, nctdtr

from eval.stats.crossed import Array, MeanSquares, crossed_variance, mean_squares, random_stream, t_quantile

MOST_SEEDS, MOST_CLUSTERS = 200, 1_000_000
GOAL = 0.8
FAR = 30.0  # standard errors: from there on the noncentral t of scipy underflows
HOPELESS = 5.0  # a shift further below 0 passes with a chance below 3e-7; scipy may say NaN there


@dataclass(frozen=True)
class Components:
    """Variance of one entry of a crossed table, by origin; of one pilot, or of many."""

    seeds: float | Array
    documents: float | Array
    residual: float | Array

    def mean_squares(self, s: ArrayLike, c: ArrayLike) -> MeanSquares:
        """Expected mean squares of a table of `s` seeds by `c` documents (Cornfield and Tukey 1956)."""
        s, c = np.asarray(s, float), np.asarray(c, float)
        parts = self.residual + c * self.seeds, self.residual + s * self.documents, self.residual
        return MeanSquares(*np.broadcast_arrays(*(np.asarray(part, float) for part in parts)))


def _components(ms: MeanSquares, s: int, c: int) -> Components:
    """Method of moments; negative estimates count as 0."""
    seeds, documents = (ms.seeds - ms.residual) / c, (ms.documents - ms.residual) / s
    return Components(np.maximum(seeds, 0.0), np.maximum(documents, 0.0), ms.residual)


def components(z: ArrayLike) -> Components:
    """Estimates from a pilot table [S, C], S, C >= 2."""
    s, c = np.shape(z)
    estimates = _components(mean_squares(z), s, c)
    return Components(float(estimates.seeds), float(estimates.documents), float(estimates.residual))


def sample_components(z: ArrayLike, draws: int, seed: int) -> Components:
    """[draws] variances that the pilot table [S, C] leaves possible.

    Generalised pivotal quantities (Weerahandi 1993; for crossed designs Burdick, Borror and Montgomery
    2005): for normal effects each mean square is its expectation times chi2(df) / df, so mean square times
    df / chi2(df) spreads as what is not known of the expectation. With two seeds df is 1: nearly nothing
    is known, and the draws say so.
    """
    s, c = np.shape(z)
    rng = random_stream(seed)
    degrees = s - 1, c - 1, (s - 1) * (c - 1)
    squares = [m * df / rng.chisquare(df, draws) for m, df in zip(mean_squares(z), degrees, strict=True)]
    return _components(MeanSquares(*squares), s, c)


def power(parts: Components, effect: ArrayLike, s: ArrayLike, c: ArrayLike, alpha: float) -> Array:
    """Chance of a lower bound above 0 at level `alpha` when the true mean is `effect`: noncentral t.

    That far from 0 that scipy cannot say it, the mean is as good as certain and its standard error alone
    varies: t(alpha) is exceeded where chi2(nu) / nu < (shift / t(alpha))^2. With one degree of freedom and a
    small `alpha` that is no certainty even there.
    """
    s, c = np.asarray(s, float), np.asarray(c, float)
    variance, nu = crossed_variance(parts.mean_squares(s, c), s, c)
    effect, variance, nu = np.broadcast_arrays(np.asarray(effect, float), variance, nu)
    measured = variance > 0
    shift = np.divide(effect, np.sqrt(variance), out=np.zeros(variance.shape), where=measured)
    near, limit = np.clip(shift, -HOPELESS, FAR), t_quantile(alpha, nu)
    beyond = np.where(shift > 0, chdtr(nu, nu * (shift / limit) ** 2), 0.0)
    chance = np.where(near == shift, 1 - nctdtr(nu, near, limit), beyond)
    return np.where(measured, chance, 0.0)


def seeds_for(parts: Components, effect: ArrayLike, c: ArrayLike, alpha: float, goal: float = GOAL) -> Array:
    """Least number of seeds with power `goal` on `c` clusters; infinite where 200 are too few."""
    return _first(MOST_SEEDS, parts, lambda p, s: power(p, effect, s, c, alpha) >= goal)


def clusters_for(
    parts: Components, effect: ArrayLike, s: ArrayLike, alpha: float, goal: float = GOAL
) -> Array:
    """Least number of clusters with power `goal` at `s` seeds; infinite where a million are too few."""
    return _first(MOST_CLUSTERS, parts, lambda p, c: power(p, effect, s, c, alpha) >= goal)


def _first(most: int, parts: Components, enough: Callable[[Components, Array], NDArray[np.bool_]]) -> Array:
    """The first n in 2 ... `most` that is enough, for each of the components.

    Power does not always grow with n: with two seeds, more documents leave the seeds' variance alone, of
    which one degree of freedom is known. So numbers are tried from below, all up to 16 and then each a tenth
    larger than the one before; between the first that is enough and the one before it, by bisection.
    """
    columns = np.broadcast_arrays(parts.seeds, parts.documents, parts.residual)
    shape, flat = columns[0].shape, [column.astype(float).ravel() for column in columns]
    tried = np.unique(np.round([*range(2, 17), *np.geomspace(16, most, 1 + int(np.log(most / 16) / 0.1))]))
    first, before = np.full(flat[0].shape, np.inf), np.full(flat[0].shape, 1.0)
    for n in tried:
        open_ = np.flatnonzero(np.isinf(first))
        if not len(open_):
            break
        yes = enough(Components(*(column[open_] for column in flat)), np.full(len(open_), n))
        first[open_[yes]], before[open_[~yes]] = n, n
    finite = np.flatnonzero(np.isfinite(first))
    low, high, some = before[finite], first[finite], Components(*(column[finite] for column in flat))
    while (high - low > 1).any():
        middle = np.floor((low + high) / 2)
        yes = enough(some, np.maximum(middle, 2)) | (high - low <= 1)
        low, high = np.where(yes, low, middle), np.where(yes & (high - low > 1), middle, high)
    first[finite] = high
    return first.reshape(shape)


def effect_for(parts: Components, s: ArrayLike, c: ArrayLike, alpha: float, goal: float = GOAL) -> Array:
    """The smallest true mean that `s` seeds and `c` documents see with power `goal`."""
    variance, nu = crossed_variance(parts.mean_squares(s, c), np.asarray(s, float), np.asarray(c, float))
    most = FAR + t_quantile(alpha, nu) * np.sqrt(chdtri(nu, 1 - goal) / nu)  # see `power`
    low, high = np.zeros(variance.shape), most * np.sqrt(variance)
    for _ in range(40):
        middle = (low + high) / 2
        yes = power(parts, middle, s, c, alpha) >= goal
        low, high = np.where(yes, low, middle), np.where(yes, middle, high)
    return high
