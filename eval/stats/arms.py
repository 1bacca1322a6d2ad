"""How much worse is one arm of a rollout than the other? Bounds of the difference that hold at all times.

Requests are dealt to the arms by chance and are independent; each arm has bounds of its own (`sequential`),
each at half of `alpha`, so that the difference of the two errs on either side with chance alpha at most,
whenever one looks. All is computed from sums, so that no request need be kept. Leading axes are looks, or
windows of looks, or streams.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.stats.sequential import half_widths, lowest_rates, refused_counts

Array = NDArray[np.float64]
LEAST = (
    100  # requests of an arm: the bounds of a mean are exact for normal values alone, those of chances always
)
BIN = 0.015  # of the logarithm of a latency: bounds are rounded outwards to so much
BINS = 1200  # from 0.01 ms on: to more than ten minutes
FIRST = np.log(0.01)


class Bounds(NamedTuple):
    """Of a figure, or of the difference of the arms: each one-sided."""

    low: Array
    high: Array


class Tuned(NamedTuple):
    """Requests of each arm at which its bounds are narrowest."""

    release: float
    fallback: float


class Ratio(NamedTuple):
    """Sums over the requests of an arm of two values, `x` (bits) and `y` (bytes)."""

    n: Array
    x: Array
    y: Array
    xx: Array
    xy: Array
    yy: Array


def ratio_sums(x: ArrayLike, y: ArrayLike) -> Ratio:
    """The sums of values [..., n] over their last axis."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    n = np.full(x.shape[:-1], float(x.shape[-1]))
    return Ratio(n, x.sum(-1), y.sum(-1), (x * x).sum(-1), (x * y).sum(-1), (y * y).sum(-1))


def ratio_bounds(sums: Ratio, alpha: ArrayLike, tuned: float) -> Bounds:
    """Of sum(x) / sum(y), by its linear form (Cochran 1977, section 6.3); infinite below `LEAST` requests."""
    n, enough = np.maximum(sums.n, 2), sums.n >= LEAST
    ratio, mean = sums.x / np.maximum(sums.y, 1e-300), np.maximum(sums.y, 1e-300) / n
    squares = sums.xx - 2 * ratio * sums.xy + ratio**2 * sums.yy
    deviation = np.sqrt(np.maximum(squares, 0) / (n - 1)) / mean
    with np.errstate(invalid="ignore"):  # an infinite width of values that do not vary
        half = half_widths(n, alpha, tuned) * deviation
    half = np.where(enough & (deviation > 0), half, np.inf)
    return Bounds(ratio - half, ratio + half)


def chance_bounds(total: ArrayLike, n: ArrayLike, alpha: ArrayLike, tuned: float) -> Bounds:
    """Of the mean of n values between 0 and 1, by their sum."""
    total, n = np.asarray(total, float), np.asarray(n, float)
    return Bounds(lowest_rates(total, n, alpha, tuned), 1 - lowest_rates(n - total, n, alpha, tuned))


def latency_bins(ms: ArrayLike) -> NDArray[np.int64]:
    """The bin of each latency: number b holds those above `bin_edge(b)` and at most at `bin_edge(b + 1)`."""
    log = np.log(np.maximum(np.asarray(ms, float), 1e-9))
    return np.clip(np.ceil((log - FIRST) / BIN - 1e-9).astype(np.int64) - 1, 0, BINS - 1)


def bin_edge(number: ArrayLike) -> Array:
    """The lower edge of a bin, ms: 0 of the first, and none above the last."""
    number = np.asarray(number)
    inside = np.exp(FIRST + BIN * number)
    return np.where(number <= 0, 0.0, np.where(number >= BINS, np.inf, inside))


def quantile_bounds(counts: Array, q: float, alpha: ArrayLike, tuned: float) -> Bounds:
    """Of the q-quantile of latencies in bins [..., BINS], rounded outwards (Howard and Ramdas 2022)."""
    used = np.flatnonzero(counts.any(tuple(range(counts.ndim - 1))))
    first, end = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    below = counts[..., first:end].cumsum(-1)
    n = below[..., -1]
    many, few = refused_counts(n, q, alpha, tuned), refused_counts(n, 1 - q, alpha, tuned)
    upper = first + 1 + (below < many[..., None]).sum(-1)  # the first bin up to which there are so many
    lower = first + (n[..., None] - below >= few[..., None]).sum(-1)  # the last one above which there are
    return Bounds(bin_edge(lower), bin_edge(np.where(many <= n, upper, BINS)))


def quantile(counts: Array, q: float) -> Array:
    """The upper edge of the bin that holds the q-quantile, ms; not a number where there is no value."""
    below = counts.cumsum(-1)
    n = below[..., -1:]
    at = (below >= q * n).argmax(-1) + 1
    return np.where(n[..., 0] > 0, bin_edge(at), np.nan)


def difference(release: Bounds, fallback: Bounds) -> Bounds:
    """By how much the release's figure is larger."""
    return Bounds(release.low - fallback.high, release.high - fallback.low)


def relative(release: Bounds, fallback: Bounds) -> Bounds:
    """By which share of the fallback's figure, which is positive, the release's is larger."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = release.low / fallback.high - 1, release.high / fallback.low - 1
    return Bounds(np.where(np.isfinite(low), low, -1.0), np.where(np.isnan(high), np.inf, high))
