"""Ratios of means: Fieller's interval, its cross-check by bootstrap, and ratios of paired rounds."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import pdtr

from eval.stats.crossed import (
    PASS,
    Array,
    Effects,
    cluster_bounds,
    crossed_mean,
    effects,
    products,
    t_quantile,
)

CHUNK = 2_000_000  # resampled document weights held at once by the bootstrap
# 2^16 equally likely values of a Poisson variable of mean 1: variance 1 but for 3e-5
POISSON = np.searchsorted(pdtr(np.arange(9), 1.0), (np.arange(2**16) + 0.5) / 2**16).astype(float)


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
    effects_x, effects_y = effects(x), effects(y)
    below = crossed_mean(y, effects_y)
    if below.verdict(alpha) != PASS:
        return None
    top, share = float(x.mean()), float(x.mean()) / below.point
    rows, columns, rest = (a - share * b for a, b in zip(effects_x, effects_y, strict=True))
    off = crossed_mean(x - share * y, (rows, columns, rest))
    t = float(t_quantile(alpha, below.nu if off.problem else off.nu))
    xx, xy, yy = _covariance(effects_x, effects_y, (rows, columns, rest))
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


def ratio_bounds(values: ArrayLike, reference: ArrayLike, alpha: float) -> Share | None:
    """Geometric mean of paired ratios with one-sided bounds exp(mean log ratio -+ t sd / sqrt(R)).

    Round r of both ran back to back, so a slow spell of the machine cancels. None for one round.

    Args:
        values, reference: [R] positive, entry r of both from round r.
    """
    logs = np.log(np.asarray(values, float) / np.asarray(reference, float))
    bounds = cluster_bounds(logs, alpha)
    return Share(*np.exp([logs.mean(), *bounds]).tolist()) if bounds else None


def share_bounds(z: ArrayLike, alpha: float) -> tuple[float, float] | None:
    """Bounds, each at level `alpha`, of the mean of a crossed table [S, C] of shares: never beyond 0 and 1.

    Wilson's (1927) interval with the number of independent draws that would have the same variance (Korn and
    Graubard 1998) and the t quantile. A table of nothing but 0 or 1 counts as one draw for each of its C
    columns. None where the error is unknown.
    """
    z = np.asarray(z, float)
    mean, p = crossed_mean(z), float(z.mean())
    if min(z.shape) < 2 or (mean.problem and 0 < p < 1):
        return None
    p = min(max(p, 0.0), 1.0)
    size = z.shape[1] if mean.problem or p in (0, 1) else p * (1 - p) / mean.se**2
    t = float(t_quantile(alpha, z.shape[1] - 1 if mean.problem else mean.nu))
    centre, half = p + t**2 / (2 * size), t * float(np.sqrt(p * (1 - p) / size + (t / (2 * size)) ** 2))
    low, high = (end / (1 + t**2 / size) for end in (centre - half, centre + half))
    return max(low, 0.0), min(high, 1.0)
