"""The gate's mathematics: pure functions of arrays, no files, no clock.

Scores lie in tables z of S seeds by C documents. Arms share seeds and documents, so a contrast of arms is
one table, and its mean varies with both: seeds x documents is a crossed design with random effects, not
S*C independent numbers. `docs/statistics.md` tells the formulas with their sources and a simulation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, pdtr, stdtr, stdtrit

Array = NDArray[np.float64]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
PASS: Final = "PASS"
FAIL: Final = "FAIL"
INCONCLUSIVE: Final = "INCONCLUSIVE"
ROUNDING = 1e-12  # spread below this share of the largest entry is rounding, not variance
CHUNK = 2_000_000  # resampled document weights held at once by the bootstrap
# 2^16 equally likely values of a Poisson variable of mean 1: variance 1 but for 3e-5
POISSON = np.searchsorted(pdtr(np.arange(9), 1.0), (np.arange(2**16) + 0.5) / 2**16).astype(float)


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
    found = effects(np.asarray(z, float))
    return products(found, found)


def crossed_variance(ms: MeanSquares, s: ArrayLike, c: ArrayLike) -> tuple[Array, Array]:
    """Variance of the mean of a crossed table, and its degrees of freedom (Satterthwaite 1946).

    V = (MS_s + MS_c - MS_e) / (S C), unbiased for crossed random effects and floored at MS_e / (S C),
    because the difference of mean squares can be small or negative by chance. nu is that of the sum
    that is used, at least 1 and at most 2 (S - 1): where a few seeds happen to agree, V is small and nu
    large at once, and without the cap three seeds pass a false claim up to 5.9 % of the time at a nominal
    5 %, with it 5.6 %. A table without any variance has V = 0 and nu = 1: the caller refuses it.
    """
    s, c = np.asarray(s, float), np.asarray(c, float)
    total = np.maximum(ms.seeds + ms.documents - ms.residual, ms.residual)
    spread = ms.seeds**2 / (s - 1) + ms.documents**2 / (c - 1) + ms.residual**2 / ((s - 1) * (c - 1))
    nu = np.divide(total**2, spread, out=np.ones_like(spread), where=spread > 0)
    return total / (s * c), np.clip(nu, 1.0, 2.0 * (s - 1))


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
        """One-sided p-value of H0: the mean is at most 0. Without an error it is 1."""
        return 1.0 if self.problem else float(stdtr(self.nu, -self.point / self.se))

    def verdict(self, alpha: float, resolution: float = 0.0) -> Verdict:
        """PASS: lower bound above `resolution` >= 0. FAIL: upper bound below -resolution. Else neither."""
        low, high = self.bounds(alpha)
        if low is None or high is None:
            return INCONCLUSIVE
        return PASS if low > resolution else FAIL if high < -resolution else INCONCLUSIVE


def crossed_mean(z: ArrayLike, of: Effects | None = None) -> Mean:
    """Mean of a table [S, C] with the error of crossed random seeds and documents.

    One seed says nothing about seeds, one document nothing about documents, and a table without variance
    (a placebo, copies) nothing at all: these have a `problem` and never pass. `of` are the effects of the
    table, where they are known already.
    """
    z = np.asarray(z, float)
    s, c = z.shape
    point = float(z.mean())
    if s < 2:
        return Mean(point, problem="one seed says nothing about other seeds: add seeds")
    if c < 2:
        return Mean(point, problem="one document says nothing about other documents: add documents")
    of = of or effects(z)
    variance, nu = crossed_variance(products(of, of), s, c)
    if variance <= (ROUNDING * np.abs(z).max()) ** 2:
        return Mean(point, problem="the values do not vary at all, so nothing was measured")
    return Mean(point, float(np.sqrt(variance)), float(nu))


def _covariance(x: Effects, y: Effects, off: Effects) -> tuple[float, float, float]:
    """V_xx, V_xy, V_yy of two crossed means.

    The unbiased form may be indefinite by chance; where either variance, or that of `off`, which is
    x - (mean x / mean y) y, falls to its floor, the residual is not subtracted, which is always definite and
    never too small.
    """
    s, c = x[2].shape
    pairs = products(x, x), products(x, y), products(y, y)
    probes = pairs[0], pairs[2], products(off, off)
    floored = any(ms.seeds + ms.documents < 2 * ms.residual for ms in probes)
    xx, xy, yy = (float(m.seeds + m.documents - (0 if floored else m.residual)) / (s * c) for m in pairs)
    return xx, xy, yy


class Share(NamedTuple):
    """A ratio of two means with its interval."""

    point: float
    low: float
    high: float


def fieller(x: ArrayLike, y: ArrayLike, level: float = 0.95) -> Share | None:
    """Interval of mean(x) / mean(y), two crossed tables [S, C] on the same seeds and documents.

    Fieller (1954): the shares r for which mean(x) - r mean(y) does not differ from 0, that is
    (x - r y)^2 <= t^2 (V_xx - 2 r V_xy + r^2 V_yy), with nu of the table x - R y at the estimate R.

    Returns:
        The share, or None where it is undefined: mean(y) is not significantly above 0 at `level`
        (two-sided), so that the set of shares is not an interval.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    alpha = (1 - level) / 2
    if min(y.shape) < 2:
        return None
    of_x, of_y = effects(x), effects(y)
    below = crossed_mean(y, of_y)
    if below.verdict(alpha) != PASS:
        return None
    top, share = float(x.mean()), float(x.mean()) / below.point
    rows, columns, rest = (a - share * b for a, b in zip(of_x, of_y, strict=True))
    off = crossed_mean(x - share * y, (rows, columns, rest))
    t = float(t_quantile(alpha, below.nu if off.problem else off.nu))
    xx, xy, yy = _covariance(of_x, of_y, (rows, columns, rest))
    a, b, c = below.point**2 - t**2 * yy, top * below.point - t**2 * xy, top**2 - t**2 * xx
    if a <= 0:
        return None
    half = float(np.sqrt(max(b**2 - a * c, 0.0)))
    return Share(share, (b - half) / a, (b + half) / a)


def pigeonhole(tables: ArrayLike, draws: int, seed: int) -> Array:
    """Bootstrap means of K tables with seeds and documents resampled independently (Owen 2007).

    A seed's weight is how often it is drawn, a document's is Poisson(1): independent weights of mean and
    variance 1 do as well as counts (Owen and Eckles 2012), and ten thousand draws of ten thousand documents
    take seconds. Every table is resampled by the same draws, so contrasts and ratios of the columns are
    their bootstrap values. The pigeonhole bootstrap is mildly conservative in theory, but with a handful of
    seeds each of its seed resamples is too narrow by about (S - 1) / S: it cross-checks Fieller and is
    never the test.

    Args:
        tables: [K, S, C]; for ratios of sums give weighted values (bits), not per-byte ones.

    Returns:
        [draws, K]
    """
    tables = np.asarray(tables, float)
    k, s, c = tables.shape
    rng = np.random.default_rng(seed)
    flat = np.ascontiguousarray(tables.reshape(k * s, c).T)
    step = max(CHUNK // c, 1)
    means = np.empty((draws, k))
    for start in range(0, draws, step):
        n = min(step, draws - start)
        seeds = rng.multinomial(s, np.full(s, 1 / s), size=n) / s  # [n, S]
        weights = POISSON[rng.integers(len(POISSON), size=(n, c), dtype=np.uint16)]
        while (none := weights.sum(1) == 0).any():  # of a handful of documents: a draw without any is no draw
            weights[none] = POISSON[rng.integers(len(POISSON), size=(none.sum(), c), dtype=np.uint16)]
        sums = (weights @ flat).reshape(n, k, s) / weights.sum(1)[:, None, None]
        means[start : start + n] = np.einsum("ns,nks->nk", seeds, sums)
    return means


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): comparing them with alpha bounds the chance of any false claim."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in adjusted]


def requests_needed(q: float, alpha: float) -> int:
    """Independent requests without which the q-quantile has no upper bound: least n with q^n <= alpha."""
    return int(np.ceil(np.log(alpha) / np.log(q) - 1e-9))


def quantile_bounds(
    values: ArrayLike, q: float, alpha: float, each: int = 1
) -> tuple[float | None, float | None]:
    """One-sided lower and upper bound of the q-quantile, each at level `alpha`, by order statistics.

    The number of values below the quantile is binomial whatever the distribution, so the smallest x_(k)
    with P(Bin(n, q) <= k - 1) >= 1 - alpha is an upper bound (David and Nagaraja, Order Statistics, 3rd
    ed. 2003, section 7.1). Where no order statistic reaches the level, the bound is None: the largest of
    ten values is no bound of a p99.

    Args:
        each: values that come together, as the tokens of one request. Only so many groups are independent, so
            the order statistic is taken as if every group were one value, repeated.
    """
    ordered = np.sort(np.asarray(values, float))
    n = len(ordered) // each
    below = np.arange(n)
    above = int(np.searchsorted(bdtr(below, n, q), 1 - alpha))
    under = int(np.searchsorted(bdtr(below, n, 1 - q), 1 - alpha))  # the same rule, counted from the top
    return (
        float(ordered[(n - 1 - under) * each]) if under < n else None,
        float(ordered[(above + 1) * each - 1]) if above < n else None,
    )


def cluster_bounds(values: ArrayLike, alpha: float) -> tuple[float, float] | None:
    """One-sided t bounds of the mean over processes, each at level `alpha`; None for one process.

    Requests of one process share its memory layout and its neighbours: the process is the cluster.
    """
    values = np.asarray(values, float)
    if len(values) < 2:
        return None
    half = float(t_quantile(alpha, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def percentile_bounds(
    processes: Sequence[ArrayLike], q: float, alpha: float, each: int = 1
) -> tuple[float | None, float | None]:
    """Bounds of a latency quantile over requests grouped in processes, each at level `alpha`.

    Upper: the larger of the order statistic of all requests (blind to processes) and the t bound over the
    processes' own quantiles (blind to the tail). Lower: the smaller. None where either cannot be had.
    """
    pooled = np.concatenate([np.asarray(x, float) for x in processes])
    low, high = quantile_bounds(pooled, q, alpha, each)
    between = cluster_bounds([np.quantile(np.asarray(x, float), q) for x in processes], alpha)
    if between is None:
        return None, None
    return (
        None if low is None else min(low, between[0]),
        None if high is None else max(high, between[1]),
    )


def ratio_bounds(values: ArrayLike, reference: ArrayLike, alpha: float) -> Share | None:
    """Geometric mean of paired ratios with one-sided bounds exp(mean log ratio -+ t sd / sqrt(R)).

    Round r of both ran back to back, so a slow spell of the machine cancels. None for one round.

    Args:
        values, reference: [R] positive, entry r of both from round r.
    """
    logs = np.log(np.asarray(values, float) / np.asarray(reference, float))
    bounds = cluster_bounds(logs, alpha)
    return Share(*np.exp([logs.mean(), *bounds]).tolist()) if bounds else None
