"""Bounds of percentiles and of sizes where processes differ."""

import numpy as np
import pytest

from eval.stats.quantiles import largest_bounds, percentile_bounds, quantile_bounds
from scripts.simulation.parts import Tail, tail_misses


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize("q", [0.5, 0.95])
@pytest.mark.parametrize("n", [20, 60])
def test_processes_that_do_not_differ_have_the_order_statistic_of_all_requests(rng, q, n):
    logs = rng.normal(0, 0.1, size=(5, n))
    alike = np.exp(logs - logs.mean(1, keepdims=True))
    expected = quantile_bounds(alike.ravel(), q, 0.05)
    assert percentile_bounds(list(alike), q, 0.05) == pytest.approx(expected)


def test_log_normal_latencies_have_the_bound_of_normal_theory(rng):
    """Reference: mean and variances by generalised pivotal quantities, the quantile in closed form."""
    s, n, q, draws = 5, 2000, 0.95, 400_000
    means = rng.normal(0, 0.1, s)
    logs = means[:, None] + rng.normal(0, 0.05, size=(s, n))
    own, within = logs.mean(1), logs.var(1, ddof=1).mean()
    total = own.var(ddof=1) * (s - 1) / rng.chisquare(s - 1, draws)
    residual = within * (s * (n - 1)) / rng.chisquare(s * (n - 1), draws)
    centre = own.mean() + rng.normal(size=draws) * np.sqrt(total / s)
    quantiles = centre + 1.6449 * np.sqrt(np.maximum(total - residual / n, 0) + residual)
    low, high = percentile_bounds(list(np.exp(logs)), q, 0.05)
    assert np.log(high) == pytest.approx(np.quantile(quantiles, 0.95), rel=0.1)
    assert np.log(low) == pytest.approx(np.quantile(quantiles, 0.05), abs=0.02)


def test_requests_are_counted_and_not_their_tokens(rng):
    """A slow request is slow in all its tokens: ten copies of each value say no more than one."""
    processes = [rng.lognormal(0, 0.1, 30) for _ in range(4)]
    copies = [np.repeat(x, 10) for x in processes]
    assert percentile_bounds(copies, 0.95, 0.05, 10) == pytest.approx(
        percentile_bounds(processes, 0.95, 0.05), rel=0.01
    )


def test_what_has_no_bound_has_none(rng):
    processes = [rng.lognormal(0, 0.1, 10) for _ in range(5)]
    assert percentile_bounds(processes[:1], 0.5, 0.05) == (None, None)
    assert percentile_bounds(processes, 0.95, 0.05)[1] is None, "50 requests"
    assert percentile_bounds(processes, 0.5, 1e-4) == (None, None), "beyond what was drawn"
    assert percentile_bounds([np.ones(20)] * 5, 0.5, 0.05) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("tail", [Tail(5, 24, 0.1, 0.05), Tail(3, 24, 0.03, 0.05, 0.03)])
def test_the_percentile_of_all_processes_is_bounded(tail):
    """What processes differ by was not in the bound: it lay below the truth in a third of all studies."""
    misses = tail_misses(tail, 0.95, 150)
    assert misses["of all processes"] <= 0.06
    if tail.between == 0.1:
        assert misses["mean of percentiles"] > 0.2


def test_the_largest_is_bounded(rng):
    for s in (3, 5):
        sizes = rng.lognormal(5, 0.01, size=(2000, 2, s))
        bounds = [largest_bounds(seen, 0.05) for seen, _ in sizes]
        below = np.mean([high < again.max() for (_, high), (_, again) in zip(bounds, sizes, strict=True)])
        above = np.mean([low > again.max() for (low, _), (_, again) in zip(bounds, sizes, strict=True)])
        assert 0.02 < below <= 0.06
        assert above < 0.05
    assert largest_bounds([1.0], 0.05) is None
    assert largest_bounds([2.0, 2.0], 0.05) == pytest.approx((2.0, 2.0))
