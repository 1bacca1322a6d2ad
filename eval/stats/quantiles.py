"""Bounds of quantiles, of independent requests and of requests grouped in processes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from eval.stats.crossed import Array, random_stream, t_quantile

DRAWS, SEED = 2000, 0  # of generalised pivotal quantities: no level below 1 / DRAWS can be had
GRID = 256  # points at which a distribution function is held
SPREADS = 12  # standard deviations between which quantiles are interpolated
FAR = 4.0  # standard deviations at which a normal kernel ends


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


def largest_bounds(values: ArrayLike, alpha: float) -> tuple[float, float] | None:
    """Bounds, each at level `alpha`, of the largest of as many values drawn anew; None of one value.

    Of positive values with normal logarithms. Upper: a prediction bound for each of S new ones at alpha / S
    (Bonferroni; Hahn and Meeker, Statistical Intervals, 1991, section 4.8). Lower: the t bound of their
    mean, which the largest is not below.
    """
    logs = np.log(np.asarray(values, float))
    s = len(logs)
    if s < 2:
        return None
    mean, spread = float(logs.mean()), float(logs.std(ddof=1))
    low = mean - float(t_quantile(alpha, s - 1)) * spread / s**0.5
    high = mean + float(t_quantile(alpha / s, s - 1)) * spread * (1 + 1 / s) ** 0.5
    return float(np.exp(low)), float(max(np.exp(high), np.max(values)))


def percentile_bounds(
    processes: Sequence[ArrayLike], q: float, alpha: float, each: int = 1
) -> tuple[float | None, float | None]:
    """Bounds of a latency quantile over the requests of all processes there could be, each at level `alpha`.

    The logarithm of a latency is that of its process, normal over processes, plus a residual of any
    distribution, the same in all: a log-normal random effect. What is not known of the mean and the variance
    of processes, and of the residual's distribution, is drawn by generalised pivotal quantities (Weerahandi
    1993; Krishnamoorthy and Mathew, Statistical Tolerance Regions, 2009, chapter 5), and the bound is a
    quantile of the quantiles that follow. For processes that do not differ it is the order statistic of all
    requests (`quantile_bounds`). None where there is one process, or too few requests.

    Args:
        processes: [n] positive values of each process, in the unit of the bounds; infinite: did not end.
        each: values that came together; see `quantile_bounds`.
    """
    if len(processes) < 2:
        return None, None
    values = [np.asarray(x, float) for x in processes]
    most = max(float(x[np.isfinite(x)].max(initial=0.0)) for x in values)  # what never ended took longer
    endless = not all(np.isfinite(x).all() for x in values)
    if most == 0:
        return None, None
    low, high = _draw_quantiles([np.log(np.minimum(x, most)) for x in values], q, each)
    place = int(alpha * (DRAWS + 1)) - 1  # of the sorted draws, from either end
    if place < 0:
        return None, None
    ends = np.exp([np.sort(low)[place], np.sort(high)[-1 - place]])
    known = np.isfinite(ends[1]) and not (endless and ends[1] >= most)
    return float(ends[0]) if ends[0] > 0 else None, float(ends[1]) if known else None


def _draw_quantiles(logs: list[Array], q: float, each: int) -> tuple[Array, Array]:
    """[DRAWS] quantiles that the values leave possible: a lower and an upper one, as values lie apart.

    Of N requests K ~ Bin(N, q) lie below the quantile, so it is between the K-th and the next residual:
    unbounded where there is none.
    """
    rng, s = random_stream(SEED), len(logs)
    requests = [x[: len(x) // each * each].reshape(-1, each).mean(1) for x in logs]
    counts = np.array([len(x) for x in requests])
    means = np.array([x.mean() for x in requests])
    freedom = int((counts - 1).sum())
    within = sum(float(((x - x.mean()) ** 2).sum()) for x in requests) / max(freedom, 1)
    total = means.var(ddof=1) * (s - 1) / rng.chisquare(s - 1, DRAWS)
    noise = within * np.mean(1 / counts) * freedom / rng.chisquare(max(freedom, 1), DRAWS)
    mean = means.mean() + rng.standard_normal(DRAWS) * np.sqrt(total / s)
    spread = np.sqrt(np.maximum(total - noise, 0.0))
    residuals = np.sort(np.concatenate([x - m for x, m in zip(logs, means, strict=True)]))
    n = int(counts.sum())
    share = (rng.permutation(DRAWS) + 0.5) / DRAWS  # stratified: exactly as many are unbounded
    below = np.searchsorted(bdtr(np.arange(n), n, q), share)
    low, high = mean + _smoothed_quantiles(residuals, spread, np.stack([below - 0.5, below + 0.5]) / n)
    return np.where(below == 0, -np.inf, low), np.where(below == n, np.inf, high)


def _smoothed_quantiles(values: Array, spread: Array, level: Array) -> Array:
    """[..., n] `level` quantiles of the sorted `values` plus a normal variable of deviation `spread`.

    The distribution function of the sum is that of the values smoothed by a normal kernel. It is held at a
    few standard deviations and interpolated between them.

    Args:
        spread: [n] standard deviations.
        level: [..., n]
    """
    n = len(values)
    plain = values[np.clip(np.ceil(level * n).astype(int) - 1, 0, n - 1)]
    most = float(spread.max())
    if most == 0:
        return plain
    grid = most * np.geomspace(0.02, 1, SPREADS)
    place = np.interp(np.log(np.maximum(spread, grid[0])), np.log(grid), np.arange(SPREADS))
    smoothed = np.zeros(level.shape)
    for i, sigma in enumerate(grid):
        near = np.flatnonzero(np.abs(place - i) < 1)
        weight = 1 - np.abs(place[near] - i)
        smoothed[..., near] += weight * _smoothed_at(values, sigma, level[..., near])
    return np.where(spread < grid[0], plain, smoothed)


def _smoothed_at(values: Array, sigma: float, level: Array) -> Array:
    x = np.linspace(values[0] - FAR * sigma, values[-1] + FAR * sigma, GRID)
    step = x[1] - x[0]
    reach = min(int(FAR * sigma / step) + 1, GRID)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) * step / sigma) ** 2)
    below = np.searchsorted(values, x, side="right") / len(values)
    padded = np.concatenate([np.zeros(reach), below, np.ones(reach)])
    smooth = np.convolve(padded, kernel / kernel.sum(), mode="valid")
    return np.interp(level, smooth, x)
