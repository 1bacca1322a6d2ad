"""Bounds of quantiles, of independent requests and of requests grouped in processes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr

from eval.stats.crossed import cluster_bounds


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
