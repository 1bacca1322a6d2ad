"""The crossed test: scores lie in tables z of S seeds by C documents.

Arms share seeds and documents, so a contrast of arms is one table, and its mean varies with both:
seeds x documents is a crossed design with random effects, not S*C independent numbers.
`docs/statistics.md` gives the formulas with their sources and a simulation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit

Array = NDArray[np.float64]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
PASS: Final = "PASS"
FAIL: Final = "FAIL"
INCONCLUSIVE: Final = "INCONCLUSIVE"
ROUNDING = 1e-12  # spread below this share of the largest entry is rounding, not variance


GENERATOR: Final = "Philox"  # of random numbers: its stream is the same in every version of numpy


def random_stream(seed: int | Sequence[int]) -> np.random.Generator:
    """The generator of every drawn figure of a verdict (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(seed))


def t_quantile(alpha: float, nu: ArrayLike) -> Array:
    """The value that Student's t with `nu` degrees of freedom exceeds with chance `alpha`.

    From scipy.special: importing scipy.stats takes longer than the whole gate.
    """
    return -stdtrit(nu, alpha)


def linearise(bits: ArrayLike, size: ArrayLike) -> Array:
    """Per-document values whose plain mean is the corpus score, a ratio of sums.

    Bits per byte R = sum(bits) / sum(bytes) is no mean of documents: a long one counts more, and the
    denominator is sampled too. Its first-order form (Cochran, Sampling Techniques, 3rd ed. 1977, section
    6.3) is R + w_i (l_i - R) with l = bits / bytes and w = bytes / mean(bytes). A long document draws R to
    itself, so that its own residual is too small by 1 - w_i / C; divided by that, the values are the
    pseudo-values of the delete-one jackknife (Tukey 1958), here moved so that their mean is R exactly. They
    are linear in `bits`, so the table of a contrast of arms is the contrast of their tables.

    Args:
        bits: [..., S, C] bits per document.
        size: [C] bytes per document, positive.

    Returns:
        [..., S, C] bits per byte.
    """
    bits, size = np.asarray(bits, float), np.asarray(size, float)
    share = size / size.sum()
    score = bits.sum(-1, keepdims=True) / size.sum()
    if len(size) == 1:
        return score
    spread = (bits / size - score) * (share / (1 - share) * (len(size) - 1))
    return score + spread - spread.mean(-1, keepdims=True)


class MeanSquares(NamedTuple):
    """Mean squares of an S x C table without replication; each field has the table's leading shape."""

    seeds: Array
    documents: Array
    residual: Array


Effects = tuple[Array, Array, Array]  # [..., S, 1] of seeds, [..., 1, C] of documents, [..., S, C] the rest


def effects(z: Array) -> Effects:
    """What seeds and documents add to the mean of a table, and what neither explains."""
    centred = z - z.mean(axis=(-2, -1), keepdims=True)
    rows, columns = centred.mean(-1, keepdims=True), centred.mean(-2, keepdims=True)
    return rows, columns, centred - rows - columns


def products(x: Effects, y: Effects) -> MeanSquares:
    """Mean products of the effects of two tables; of a table with itself, its mean squares."""
    (s, c), (rx, cx, ex), (ry, cy, ey) = x[2].shape[-2:], x, y
    return MeanSquares(
        c * (rx * ry).sum((-2, -1)) / (s - 1),
        s * (cx * cy).sum((-2, -1)) / (c - 1),
        (ex * ey).sum((-2, -1)) / ((s - 1) * (c - 1)),
    )


def mean_squares(z: ArrayLike) -> MeanSquares:
    """Of a table [..., S, C] with S, C >= 2."""
    parts = effects(np.asarray(z, float))
    return products(parts, parts)


def crossed_variance(ms: MeanSquares, s: ArrayLike, c: ArrayLike) -> tuple[Array, Array]:
    """Variance of the mean of a crossed table, and its degrees of freedom (Satterthwaite 1946).

    V = (MS_s + MS_c - MS_e) / (S C), unbiased for crossed random effects and floored at MS_e / (S C),
    because the difference of mean squares can be small or negative by chance. nu is that of the sum
    that is used, at least the smaller of S - 1 and C - 1, and at most twice that: where a few seeds, or a few
    documents, happen to agree, V is small and nu large at once, and without the cap three seeds pass a false
    claim up to 5.9 % of the time at a nominal 5 %, with it 5.6 %. A table without any variance has V = 0: the
    caller refuses it.
    """
    s, c = np.asarray(s, float), np.asarray(c, float)
    total = np.maximum(ms.seeds + ms.documents - ms.residual, ms.residual)
    spread = ms.seeds**2 / (s - 1) + ms.documents**2 / (c - 1) + ms.residual**2 / ((s - 1) * (c - 1))
    nu = np.divide(total**2, spread, out=np.ones_like(spread), where=spread > 0)
    fewest = np.minimum(s, c) - 1
    return total / (s * c), np.clip(nu, fewest, 2 * fewest)


@dataclass(frozen=True)
class Mean:
    """The mean of a crossed table. Where `problem` is set, its error is unknown and bounds are None."""

    point: float
    se: float = 0.0
    nu: float = 0.0
    problem: str | None = None

    def bounds(self, alpha: float) -> tuple[float, float] | tuple[None, None]:
        """One-sided lower and upper bound, each at level `alpha` (both: a 1 - 2 alpha interval)."""
        if self.problem:
            return None, None
        half = float(t_quantile(alpha, self.nu)) * self.se
        return self.point - half, self.point + half

    @property
    def p(self) -> float:
        """One-sided p-value of H0: the mean is at most 0."""
        return self.p_at_most(0.0)

    def p_at_most(self, limit: float) -> float:
        """One-sided p-value of H0: the mean is at most `limit`. Without an error it is 1."""
        return 1.0 if self.problem else float(stdtr(self.nu, (limit - self.point) / self.se))

    def p_above(self, limit: float) -> float | None:
        """One-sided p-value of H0: the mean is at least `limit`; None without an error."""
        return None if self.problem else float(stdtr(self.nu, (self.point - limit) / self.se))

    def verdict(self, alpha: float, resolution: float = 0.0) -> Verdict:
        """PASS: lower bound above `resolution` >= 0. FAIL: upper bound below -resolution. Else neither."""
        low, high = self.bounds(alpha)
        if low is None or high is None:
            return INCONCLUSIVE
        return PASS if low > resolution else FAIL if high < -resolution else INCONCLUSIVE


def crossed_mean(z: ArrayLike, known: Effects | None = None) -> Mean:
    """Mean of a table [S, C] with the error of crossed random seeds and documents.

    One seed says nothing about seeds, one document nothing about documents, and a table without variance
    (a placebo, copies) nothing at all: these have a `problem` and never pass. `known` are the effects of the
    table, where the caller has them already.
    """
    z = np.asarray(z, float)
    s, c = z.shape
    point = float(z.mean())
    if s < 2:
        return Mean(point, problem="one seed says nothing about other seeds: add seeds")
    if c < 2:
        return Mean(point, problem="one cluster of documents says nothing about others: add clusters")
    parts = known or effects(z)
    variance, nu = crossed_variance(products(parts, parts), s, c)
    if variance <= (ROUNDING * np.abs(z).max()) ** 2:
        return Mean(point, problem="the values do not vary at all, so nothing was measured")
    return Mean(point, float(np.sqrt(variance)), float(nu))


def cluster_bounds(values: ArrayLike, alpha: float) -> tuple[float, float] | None:
    """One-sided t bounds of the mean over processes, each at level `alpha`; None for one process.

    Requests of one process share its memory layout and its neighbours: the process is the cluster.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    half = float(t_quantile(alpha, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half
