"""Bounds that hold at all times: against quadrature, the published formula, and simulated streams."""

import numpy as np
import pytest
from scipy import integrate, stats

from eval.stats.sequential import (
    half_widths,
    log_evidence,
    log_rate_evidence,
    mean_bounds,
    mixture_weight,
    quantile_bounds,
    rate_bounds,
    start_level,
)
from scripts.simulation.watch import WAYS, Looks, first_alarms

ALPHA = 0.05


@pytest.mark.parametrize(("n", "ratio"), [(3, 2.0), (8, 0.9), (8, -0.4), (40, 0.3)])
def test_evidence_is_the_mixture_of_likelihood_ratios_of_student_t(n, ratio):
    """The t statistic is all that a scale leaves: a noncentral t under each alternative, a t under the null."""
    weight, t = 6.0, ratio * np.sqrt(n)

    def mixed(effect):
        prior = 2 * stats.norm.pdf(effect, scale=weight**-0.5)
        return prior * stats.nct.pdf(t, n - 1, effect * np.sqrt(n)) / stats.t.pdf(t, n - 1)

    expected, _ = integrate.quad(mixed, 0, 5, limit=200)
    assert np.exp(log_evidence(ratio, n, weight)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("successes", "n", "rate"), [(3, 10, 0.1), (0, 10, 0.1), (30, 40, 0.6)])
def test_evidence_of_a_rate_is_the_mixture_of_likelihood_ratios(successes, n, rate):
    weight = 5.0
    prior = stats.beta(weight * rate, weight * (1 - rate))

    def mixed(p):
        return prior.pdf(p) * stats.binom.pmf(successes, n, p) / stats.binom.pmf(successes, n, rate)

    expected = integrate.quad(mixed, rate, 1)[0] / prior.sf(rate)
    assert np.exp(log_rate_evidence(successes, n, rate, weight)) == pytest.approx(expected, rel=1e-5)


def test_widths_are_those_of_the_published_normal_mixture_for_many_values():
    """Howard et al. (2021): the one-sided normal mixture at variance 1."""
    n, tuned = np.array([500.0, 5_000, 50_000]), 1000
    rho = mixture_weight(tuned, ALPHA)
    boundary = np.sqrt(2 * (n + rho) * np.log(np.sqrt((n + rho) / rho) / (2 * ALPHA) + 1))
    assert half_widths(n, ALPHA, tuned) == pytest.approx(boundary / n, rel=0.01)
    plain = -stats.norm.ppf(ALPHA) / np.sqrt(n)
    assert (half_widths(n, ALPHA, tuned) > 1.5 * plain).all()


def test_a_mean_is_missed_seldom_however_often_one_looks():
    """Every one of 300 looks; a t bound misses five times as often."""
    x, n = np.random.default_rng(0).normal(size=(2000, 300)), np.arange(1, 301)
    mean = x.cumsum(1) / n
    deviation = np.sqrt(np.maximum((x**2).cumsum(1) - n * mean**2, 0) / np.maximum(n - 1, 1))
    at, width = slice(1, None), half_widths(n, ALPHA, 100)
    sides = [((side * mean - np.where(n > 1, width, 9) * deviation)[:, at] > 0).any(1) for side in (1, -1)]
    assert all(0.005 < missed.mean() <= ALPHA for missed in sides)
    plain = stats.t.ppf(1 - ALPHA, np.maximum(n - 1, 1)) / np.sqrt(n)
    assert ((mean - plain * deviation)[:, at] > 0).any(1).mean() > 4 * ALPHA
    low, high = mean_bounds(x[0], ALPHA, 100)
    assert (low, high) == pytest.approx(mean[0, -1] + np.array([-1, 1]) * width[-1] * deviation[0, -1])


def test_a_quantile_is_missed_seldom_however_often_one_looks():
    rng, looks, missed = np.random.default_rng(1), (25, 50, 100, 200, 400), np.zeros(2)
    limit = -np.log(1 - 0.9)
    for _ in range(250):
        x = rng.exponential(size=400)
        bounds = [quantile_bounds(x[:n], 0.9, ALPHA, 100) for n in looks]
        missed += [
            any(low is not None and low > limit for low, _ in bounds),
            any(high is not None and high < limit for _, high in bounds),
        ]
    assert (missed / 250 <= 0.06).all()
    assert (missed > 0).all()


def test_a_rate_is_missed_seldom_however_often_one_looks():
    rng, n, weight = np.random.default_rng(3), np.arange(1, 501), mixture_weight(100, ALPHA)
    for rate in (0.02, 0.9):
        counts = (rng.random((500, 500)) < rate).cumsum(1)
        refused = log_rate_evidence(counts, n, rate, weight) >= -np.log(ALPHA)
        assert 0 < refused.any(1).mean() <= ALPHA
    low, high = rate_bounds(30, 400, ALPHA, 100)
    edges = [log_rate_evidence(30, 400, low, weight), log_rate_evidence(370, 400, 1 - high, weight)]
    assert edges == pytest.approx([-np.log(ALPHA)] * 2), "the bounds are where the evidence is 1 / alpha"
    assert low < 30 / 400 < high


def test_too_few_or_equal_values_have_no_bound():
    assert mean_bounds([1.0], ALPHA, 100) is None
    assert mean_bounds([1.0, 2.0], ALPHA, 100) is None, "two values show nothing at this level"
    assert mean_bounds(np.ones(50), ALPHA, 100) is None
    assert quantile_bounds(np.arange(20.0), 0.95, ALPHA, 100)[1] is None
    assert rate_bounds(0, 50, ALPHA, 100)[0] == 0
    assert rate_bounds(50, 50, ALPHA, 100)[1] == 1


def test_starts_share_one_level():
    assert sum(start_level(ALPHA, j) for j in range(1, 10_000)) == pytest.approx(ALPHA, rel=1e-3)


def test_a_year_of_looks_calls_a_good_release_broken_seldom_and_a_broken_one_soon():
    good, broken, changed = (
        first_alarms(case, 500) for case in (Looks(40, 1, 1), Looks(40, -2, -2), Looks(40, 1, -2))
    )
    false = {name: np.isfinite(good[name]).mean() for name in WAYS}
    assert false["each week alone"] > 0.14
    assert max(false["sequence"], false["since"]) <= 0.05
    assert max(np.median(broken[name]) for name in ("sequence", "since")) <= 6
    assert np.median(changed["since"]) - 26 <= 8 < np.median(changed["sequence"]) - 26
    at_floor = first_alarms(Looks(40, 0, 0), 500)
    assert np.isfinite(at_floor["all so far, t"]).mean() > 0.15
    assert max(np.isfinite(at_floor[name]).mean() for name in ("sequence", "since")) <= 0.06
