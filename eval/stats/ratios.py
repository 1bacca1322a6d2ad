"""Ratios of means: Fieller's interval, its cross-check by bootstrap, and ratios of paired rounds."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import pdtr

from eval.stats.crossed import (
    PASS,
    Array,
    MeanSquares,
    cluster_bounds,
    crossed_mean,
    crossed_variance,
    effects,
    products,
    random_stream,
    t_quantile,
)

CHUNK = 2_000_000  # resampled document weights held at once by the bootstrap
# 2^16 equally likely values of a Poisson variable of mean 1: variance 1 but for 3e-5
POISSON = np.searchsorted(pdtr(np.arange(9), 1.0), (np.arange(2**16) + 0.5) / 2**16).astype(np.float32)


class Share(NamedTuple):
    """A ratio of two means with its interval."""

    point: float
    low: float
    high: float


def fieller(x: ArrayLike, y: ArrayLike, alpha: float = 0.05) -> Share | None:
    """Interval of mean(x) / mean(y), two crossed tables [S, C] on the same seeds and documents.

    Fieller's (1954) set: the shares r for which the crossed test finds mean(x - r y) neither above nor below
    0 at `alpha`; with both ends a 1 - 2 alpha interval. It is the very test that decides, its variance and
    its degrees of freedom at each r, so that r lies below the interval where the claim of r passes.

    Returns:
        The share, or None where it is undefined: mean(y) is not significantly above 0 at `alpha`, so that
        the set of shares is not an interval.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if min(y.shape) < 2:
        return None
    (s, c), effects_x, effects_y = y.shape, effects(x), effects(y)
    below = crossed_mean(y, effects_y)
    if below.verdict(alpha) != PASS:
        return None
    pairs = products(effects_x, effects_x), products(effects_x, effects_y), products(effects_y, effects_y)
    share = float(x.mean()) / below.point

    def excess(r: Array) -> Array:
        """|mean(x - r y)| above what the test allows: positive where r is rejected."""
        squares = (np.maximum(xx - 2 * r * xy + r**2 * yy, 0.0) for xx, xy, yy in zip(*pairs, strict=True))
        variance, nu = crossed_variance(MeanSquares(*squares), s, c)
        return np.abs((share - r) * below.point) - t_quantile(alpha, nu) * np.sqrt(variance)

    step = max(below.se / below.point, 1e-9) * max(abs(share), 1.0)
    return Share(share, *(_first_positive(excess, share, sign * step) for sign in (-1, 1)))


def _first_positive(f: Callable[[Array], Array], start: float, step: float) -> float:
    """The place nearest to `start`, in the direction of `step`, from which f is positive: f(start) is not.

    Places a fifth further each time, from a thousandth of `step` on, then by 64 parts of what is between.
    """
    places = start + step * np.concatenate([[0.0], 1e-3 * 1.2 ** np.arange(200)])
    for _ in range(7):
        first = int(np.argmax(f(places) > 0))
        if first == 0:  # nowhere, or within rounding of the start
            return float(places[0] if f(places[:1])[0] > 0 else places[-1])
        places = np.linspace(places[first - 1], places[first], 65)
    return float(places[-1])


def pigeonhole(tables: ArrayLike, draws: int, seed: int) -> Array:
    """Bootstrap means of K tables with seeds and documents resampled independently (Owen 2007).

    A seed's weight is how often it is drawn, a document's is Poisson(1): independent weights of mean and
    variance 1 do as well as counts (Owen and Eckles 2012), and ten thousand draws of ten thousand documents
    take seconds. Every table is resampled by the same draws, so contrasts and ratios of the columns are
    their bootstrap values. The pigeonhole bootstrap is mildly conservative in theory, but with a handful of
    seeds each of its seed resamples is too narrow by about (S - 1) / S: it cross-checks Fieller and is
    never the test. Sums are formed in float32, which changes no digit that is shown.

    Args:
        tables: [K, S, C]; for ratios of sums give weighted values (bits), not per-byte ones.

    Returns:
        [draws, K]
    """
    tables = np.asarray(tables, float)
    k, s, c = tables.shape
    rng = random_stream(seed)
    flat = np.ascontiguousarray(tables.reshape(k * s, c).T, np.float32)
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
