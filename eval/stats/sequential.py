"""Bounds that hold at all times at once, so that looking every week costs no error rate.

A bound of a plain test errs with chance alpha at each look; over many looks it errs nearly always. Each bound
here comes from a test martingale: the likelihood of a mixture of alternatives over that of the null
hypothesis. By Ville's (1939) inequality it ever exceeds 1 / alpha with chance at most alpha, so the values
that it has not refused are a confidence sequence (Howard, Ramdas, McAuliffe and Sekhon 2021, Time-uniform,
nonparametric, nonasymptotic confidence sequences). Looks may come at any time, and end at any time, for
any reason. Every bound is one-sided at `alpha`: both together leave 1 - 2 alpha.

`tuned` is the number of values at which a sequence is about as narrow as it can be made. It is chosen before
the values are seen; any choice is valid, and a wrong one costs width alone.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincc, betaln, stdtr

Array = NDArray[np.float64]
STEPS = 60  # of bisection of a logarithm: to 1e-16
RATE_STEPS = 40  # the same of a chance: to 4e-11 of it
ROUNDING = 1e-12  # spread below this share of the largest value is rounding, not variance


def mixture_weight(tuned: float, alpha: ArrayLike) -> Array:
    """The values that the mixture counts as: for one side (Howard et al. 2021)."""
    twice = 2 * np.log(1 / (2 * np.asarray(alpha, float)))
    return tuned / (twice + np.log(1 + twice))


def log_evidence(ratio: ArrayLike, n: ArrayLike, weight: ArrayLike) -> Array:
    """Log of the evidence of n independent values against "the mean is at most 0".

    The normal mixture where the variance is unknown too: the mean is a positive multiple of the standard
    deviation, half-normal with variance 1 / weight, and the standard deviation has its invariant prior (Lai
    1976, On confidence sequences; Wang and Ramdas 2024, Anytime-valid t-tests and confidence sequences for
    Gaussian means with unknown variance). Exact for normal values from the first one on; for others as n
    grows, when it is the one-sided normal mixture of Howard et al. (2021). It grows with `ratio`, and no
    scale enters, so that it holds for every mean below 0 too.

    Args:
        ratio: sample mean by sample standard deviation.
        n: number of values, 2 or more.
    """
    r, n, weight = (np.asarray(x, float) for x in (ratio, n, weight))
    spread = (n - 1) + r**2 * n * weight / (n + weight)
    inside = (n * r) ** 2 / (n + weight)
    towards = stdtr(n, n * r * np.sqrt(n / ((n + weight) * spread)))
    with np.errstate(divide="ignore"):
        return np.log(2 * towards) + 0.5 * np.log(weight / (n + weight)) + n / 2 * np.log1p(inside / spread)


def half_widths(n: ArrayLike, alpha: ArrayLike, tuned: float) -> Array:
    """How far a bound of the mean of n values lies from their mean, in standard deviations of the sample.

    Infinite where so few values cannot show anything at this level, however large they are.
    """
    n, alpha = np.broadcast_arrays(np.asarray(n, float), np.asarray(alpha, float))
    weight = mixture_weight(tuned, alpha)
    low, high = np.full(n.shape, -30.0), np.full(n.shape, 30.0)  # of the logarithm
    enough = n >= 2
    counted = np.where(enough, n, 2)
    for _ in range(STEPS):
        middle = (low + high) / 2
        refused = log_evidence(np.exp(middle), counted, weight) >= -np.log(alpha)
        low, high = np.where(refused, low, middle), np.where(refused, middle, high)
    return np.where(enough & (high < 29.9), np.exp(high), np.inf)


def mean_bounds(values: ArrayLike, alpha: float, tuned: float) -> tuple[float, float] | None:
    """Lower and upper bound of the mean of independent values, each at level `alpha` over all times.

    None where there are too few values, or they do not vary at all.
    """
    x = np.asarray(values, float)
    if len(x) < 2:
        return None
    deviation = float(x.std(ddof=1))
    half = float(half_widths(len(x), alpha, tuned)) * deviation
    if not np.isfinite(half) or deviation <= ROUNDING * float(np.abs(x).max()):
        return None
    return float(x.mean()) - half, float(x.mean()) + half


def start_level(alpha: float, start: int) -> float:
    """The share of `alpha` of a sequence that starts at look 1, 2, ...: together they spend alpha.

    The mean of everything so far takes long to tell of a change. A sequence of its own for each look since
    which there may have been one finds it (Shin, Ramdas and Rinaldo 2024, E-detectors, mix such likewise).
    """
    return alpha / (start * (start + 1))


def log_rate_evidence(successes: ArrayLike, n: ArrayLike, rate: ArrayLike, weight: ArrayLike) -> Array:
    """Log of the evidence of `successes` among n against "the chance of one is at most `rate`".

    The beta-binomial mixture, cut off below `rate` (Howard et al. 2021; Howard and Ramdas 2022,
    Sequential estimation of quantiles). Exact for every n.
    """
    k, n, rate = (np.asarray(x, float) for x in (successes, n, rate))
    a, b = weight * rate, weight * (1 - rate)
    with np.errstate(divide="ignore"):
        above = np.log(betaincc(a + k, b + n - k, rate)) - np.log(betaincc(a, b, rate))
    return above + betaln(a + k, b + n - k) - betaln(a, b) - k * np.log(rate) - (n - k) * np.log1p(-rate)


def rate_bounds(successes: float, n: int, alpha: float, tuned: float) -> tuple[float, float]:
    """Lower and upper bound of a chance from `successes` among n, each at level `alpha` over all times.

    Of values between 0 and 1 with the sum `successes` too: their mean is bounded as a chance is.
    """
    low, high = (lowest_rates(k, n, alpha, tuned) for k in (successes, n - successes))
    return float(low), 1 - float(high)


def lowest_rates(successes: ArrayLike, n: ArrayLike, alpha: ArrayLike, tuned: float) -> Array:
    """The lower bounds of `rate_bounds`, of arrays; 0 where there is nothing yet."""
    parts = (np.asarray(x, float) for x in (successes, n, alpha))
    successes, n, alpha = np.broadcast_arrays(*parts)
    weight, some = mixture_weight(tuned, alpha), successes > 0
    k, count = np.where(some, successes, 1.0), np.where(some, n, 2.0)
    low, high = np.full(k.shape, -40.0), np.log(k / count)  # of the logarithm: refused, not refused
    for _ in range(RATE_STEPS):
        middle = (low + high) / 2
        refused = log_rate_evidence(k, count, np.exp(middle), weight) >= -np.log(alpha)
        low, high = np.where(refused, middle, low), np.where(refused, high, middle)
    return np.where(some & (low > -40), np.exp(low), 0.0)


def refused_counts(n: ArrayLike, rate: float, alpha: ArrayLike, tuned: float) -> Array:
    """The fewest successes among n that refuse "the chance of one is at most `rate`"; n + 1 where none do.

    Evidence grows with the successes, so that they are found by bisection.
    """
    n, alpha = np.broadcast_arrays(np.asarray(n, float), np.asarray(alpha, float))
    weight, count = mixture_weight(tuned, alpha), np.maximum(n, 1)
    low, high = np.zeros(n.shape), n + 1  # not refused, refused
    for _ in range(int(np.log2(n.max(initial=1) + 1)) + 2):
        middle = np.floor((low + high) / 2)
        refused = log_rate_evidence(np.minimum(middle, count), count, rate, weight) >= -np.log(alpha)
        refused &= high - low > 1
        low, high = np.where(refused | (high - low <= 1), low, middle), np.where(refused, middle, high)
    return high


def quantile_bounds(
    values: ArrayLike, q: float, alpha: float, tuned: float
) -> tuple[float | None, float | None]:
    """Lower and upper bound of the q-quantile of independent values, each at level `alpha` over all times.

    As many values lie at or below the quantile as a coin with chance q gives, whatever the distribution; a
    value is above it where that is refused of the number below (Howard and Ramdas 2022). None where
    no value is far enough out.
    """
    ordered = np.sort(np.asarray(values, float))
    n = len(ordered)
    too_many, too_few = (int(refused_counts(n, rate, alpha, tuned)) for rate in (q, 1 - q))
    return (
        float(ordered[n - too_few]) if too_few <= n else None,
        float(ordered[too_many - 1]) if too_many <= n else None,
    )
