"""The gate's mathematics against independent references, identities and simulation."""

import numpy as np
import pytest
from scipy import optimize, stats

from eval.stats.crossed import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    crossed_mean,
    crossed_variance,
    effects,
    linearise,
    mean_squares,
    products,
    random_stream,
    t_quantile,
)
from eval.stats.multiplicity import holm
from eval.stats.power import Components
from eval.stats.quantiles import quantile_bounds, requests_needed
from eval.stats.ratios import POISSON, fieller, pigeonhole, ratio_bounds, share_bounds
from scripts.simulate_gate import Mixture, mixture_false_pass


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def crossed(rng, n, s, c, seeds, documents, residual, mean=0.0):
    """[n, s, c] crossed random effects with the given standard deviations."""
    shape = [(n, s, 1), (n, 1, c), (n, s, c)]
    scales = (seeds, documents, residual)
    return mean + sum(scale * rng.normal(size=size) for scale, size in zip(scales, shape, strict=True))


# Mean squares and the variance of the mean


def test_mean_squares_are_those_of_a_least_squares_fit(rng):
    """Reference: sums of squares explained by dummy variables, fitted by `lstsq`."""
    s, c = 4, 9
    z = rng.normal(size=(s, c)) + rng.normal(size=(s, 1)) + rng.normal(size=c)
    rows, columns = np.repeat(np.eye(s), c, axis=0), np.tile(np.eye(c), (s, 1))

    def unexplained(*designs):
        design = np.hstack([np.ones((s * c, 1)), *designs])
        return float(np.sum((z.ravel() - design @ np.linalg.lstsq(design, z.ravel(), rcond=None)[0]) ** 2))

    both = unexplained(rows, columns)
    ms = mean_squares(z)
    assert ms.seeds == pytest.approx((unexplained(columns) - both) / (s - 1))
    assert ms.documents == pytest.approx((unexplained(rows) - both) / (c - 1))
    assert ms.residual == pytest.approx(both / ((s - 1) * (c - 1)))


def test_expected_mean_squares_and_unbiased_variance(rng):
    s, c, parts = 4, 15, Components(0.25, 1.0, 0.5)
    z = crossed(rng, 20_000, s, c, 0.5, 1.0, np.sqrt(0.5))
    ms, expected = mean_squares(z), parts.mean_squares(s, c)
    for values, wanted in zip(ms, expected, strict=True):
        assert values.mean() == pytest.approx(wanted, rel=0.02)
    true = 0.25 / s + 1.0 / c + 0.5 / (s * c)
    assert z.mean((1, 2)).var() == pytest.approx(true, rel=0.03)
    assert crossed_variance(ms, s, c)[0].mean() == pytest.approx(true, rel=0.03)


def test_variance_is_floored_and_nu_is_bounded(rng):
    z = crossed(rng, 2000, 3, 8, 0.0, 0.0, 1.0)
    ms = mean_squares(z)
    variance, nu = crossed_variance(ms, 3, 8)
    assert (variance >= ms.residual / 24).all()
    assert (ms.seeds + ms.documents - ms.residual < ms.residual).any()  # the floor was needed
    assert (ms.seeds + ms.documents - ms.residual < 0).any()  # and so was the guard against a negative one
    assert nu.min() >= 2
    assert nu.max() <= 4


@pytest.mark.parametrize(("s", "c"), [(10, 2), (5, 2), (10, 3)])
def test_few_clusters_that_happen_to_agree_pass_no_more_false_claims_than_few_seeds(rng, s, c):
    """Nine tenths of the variance are the clusters'; with a cap that looks at seeds alone up to 7.9 % pass."""
    rates = mixture_false_pass(rng, s, Mixture(c, 0.1, 0.9, 0.0), 200_000)
    assert rates["crossed"] <= 0.056
    assert rates["cap of seeds alone"] > 0.057


@pytest.mark.parametrize(("s", "c"), [(3, 3), (3, 64), (10, 16)])
def test_with_as_many_clusters_as_seeds_the_cap_is_that_of_seeds(rng, s, c):
    ms = mean_squares(crossed(rng, 500, s, c, 1.0, 1.0, 0.5))
    total = np.maximum(ms.seeds + ms.documents - ms.residual, ms.residual)
    parts = zip(ms, (s - 1, c - 1, (s - 1) * (c - 1)), strict=True)
    free = total**2 / sum(square**2 / freedom for square, freedom in parts)
    np.testing.assert_array_equal(crossed_variance(ms, s, c)[1], np.clip(free, s - 1, 2 * (s - 1)))


def test_products_are_bilinear(rng):
    x, y = rng.normal(size=(2, 5, 12))
    square = [np.asarray(mean_squares(z)) for z in (x + y, x - y)]
    np.testing.assert_allclose((square[0] - square[1]) / 4, np.asarray(products(effects(x), effects(y))))


def test_bounds_against_the_formulas_written_out(rng):
    z = rng.normal(0.3, 1, size=(5, 40)) + rng.normal(0, 0.4, size=(5, 1))
    rows, columns, grand = z.mean(1), z.mean(0), z.mean()
    a = 40 * sum((r - grand) ** 2 for r in rows) / 4
    b = 5 * sum((r - grand) ** 2 for r in columns) / 39
    e = sum((z[i, j] - rows[i] - columns[j] + grand) ** 2 for i in range(5) for j in range(40)) / (4 * 39)
    total = max(a + b - e, e)
    nu = total**2 / (a**2 / 4 + b**2 / 39 + e**2 / (4 * 39))
    mean = crossed_mean(z)
    low, high = mean.bounds(0.05)
    half = stats.t.ppf(0.95, min(max(nu, 4), 8)) * np.sqrt(total / 200)
    assert (low, high) == pytest.approx((grand - half, grand + half))
    assert mean.p == pytest.approx(stats.t.sf(grand / np.sqrt(total / 200), min(max(nu, 4), 8)))


@pytest.mark.parametrize("nu", [1.0, 1.7, 2.8, 40.0, 1e5])
def test_t_quantile(nu):
    assert t_quantile(0.05, nu) == pytest.approx(stats.t.isf(0.05, nu))


@pytest.mark.parametrize(
    ("z", "words"),
    [
        (np.ones((1, 9)), "one seed"),
        (np.ones((4, 1)), "one cluster of documents"),
        (np.zeros((4, 9)), "do not vary"),
        (np.full((4, 9), 0.3), "do not vary"),
    ],
)
def test_what_says_nothing_never_passes(z, words):
    mean = crossed_mean(z)
    assert words in mean.problem
    assert (mean.verdict(0.05), mean.bounds(0.05), mean.p) == (INCONCLUSIVE, (None, None), 1.0)


def test_a_teacher_that_is_the_same_for_every_seed_is_judged_by_documents(rng):
    documents = rng.normal(1, 1, size=30)
    mean = crossed_mean(np.tile(documents, (3, 1)))
    assert mean.se == pytest.approx(documents.std(ddof=1) / np.sqrt(30))
    assert mean.verdict(0.05) == PASS


def test_verdict_and_p_agree(rng):
    for shift in (-2.0, -0.2, 0.0, 0.2, 2.0):
        mean = crossed_mean(rng.normal(shift, 1, size=(4, 20)))
        verdict = mean.verdict(0.05)
        assert (verdict == PASS) == (mean.p < 0.05)
        assert (verdict == FAIL) == (mean.p > 0.95)


def test_a_gain_below_the_resolution_does_not_pass(rng):
    z = 1e-7 + 1e-9 * rng.normal(size=(4, 20))
    assert crossed_mean(z).verdict(0.05) == PASS
    assert crossed_mean(z).verdict(0.05, resolution=1e-5) == INCONCLUSIVE


# Weights


def test_linearised_mean_is_the_ratio_of_sums(rng):
    size = rng.integers(100, 5000, 50)
    bits = rng.normal(2.5, 0.2, size=(4, 50)) * size
    z = linearise(bits, size)
    assert z.mean() == pytest.approx(bits.sum() / (4 * size.sum()))
    np.testing.assert_allclose(z.mean(1), bits.sum(1) / size.sum())
    other = bits * rng.normal(1, 0.1, size=bits.shape)
    np.testing.assert_allclose(linearise(bits - other, size), z - linearise(other, size), atol=1e-9)


@pytest.mark.parametrize("n", [12, 400])
def test_linearised_spread_is_that_of_the_jackknife(rng, n):
    """Delete one document at a time and compute the ratio of sums again: no linearisation in it."""
    size = rng.lognormal(7, 0.9, n)
    bits = (2.5 + rng.normal(0, 0.2, n) - 1e-5 * size) * size
    left_out = np.array([np.delete(bits, i).sum() / np.delete(size, i).sum() for i in range(n)])
    jackknife = np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2))
    z = linearise(np.tile(bits, (2, 1)), size)[0]
    assert z.std(ddof=1) / np.sqrt(n) == pytest.approx(jackknife, rel=1e-9)
    plain = (bits / size).std(ddof=1) / np.sqrt(n)
    assert plain != pytest.approx(jackknife, rel=0.05)  # per-document values would be wrong


def test_linearised_of_one_document_is_its_score():
    assert linearise([[20.0], [30.0]], [10]).tolist() == [[2.0], [3.0]]


# Ratios


@pytest.mark.parametrize("seeds", [0.1, 0.5])
def test_fieller_is_the_inversion_of_the_test_that_decides(rng, seeds):
    """Reference: the shares at which the bounds of the table x - r y touch 0, found by root search."""
    y = crossed(rng, 1, 5, 40, seeds, 0.5, 0.5, mean=2.0)[0]
    x = 0.6 * y + crossed(rng, 1, 5, 40, seeds, 0.3, 0.3)[0]
    interval = fieller(x, y, 0.05)
    share = x.mean() / y.mean()
    low = optimize.brentq(lambda r: crossed_mean(x - r * y).bounds(0.05)[0], share - 2, share)
    high = optimize.brentq(lambda r: crossed_mean(x - r * y).bounds(0.05)[1], share, share + 2)
    assert interval == pytest.approx((share, low, high))


def test_a_share_below_the_interval_is_one_that_passes(rng):
    """The interval that is shown and the verdict are one thing, above and below."""
    seen = set()
    for _ in range(300):
        y = crossed(rng, 1, 3, 20, 0.2, 0.5, 0.5, mean=1.5)[0]
        x = 0.6 * y + crossed(rng, 1, 3, 20, 0.2, 0.5, 0.5)[0]
        if (interval := fieller(x, y, 0.05)) is None:
            continue
        verdict = crossed_mean(x - 0.5 * y).verdict(0.05)
        assert verdict == (PASS if interval.low > 0.5 else FAIL if interval.high < 0.5 else INCONCLUSIVE)
        seen.add(verdict)
    assert {PASS, INCONCLUSIVE} <= seen


def test_fieller_of_a_table_with_itself_is_one(rng):
    y = rng.normal(1, 0.3, size=(4, 30))
    assert fieller(y, y) == pytest.approx((1.0, 1.0, 1.0))


def test_fieller_is_undefined_without_a_significant_denominator(rng):
    x = rng.normal(1, 1, size=(4, 30))
    assert fieller(x, rng.normal(0.02, 1, size=(4, 30))) is None
    assert fieller(x, -x) is None
    assert fieller(x, np.zeros((4, 30))) is None
    assert fieller(x[:1], x[:1]) is None


def test_fieller_is_finite_where_the_unbiased_variance_is_not_positive(rng):
    for _ in range(200):
        x, y = rng.normal(0.5, 1, size=(3, 12)), rng.normal(2, 1, size=(3, 12))
        interval = fieller(x, y)
        assert interval is None or interval.low < interval.point < interval.high


def coverage(rng, runs: int) -> tuple[float, float]:
    """Share of intervals that hold the true 0.6: Fieller's and the bootstrap's."""
    hits = np.zeros(2)
    for i in range(runs):
        y = crossed(rng, 1, 6, 40, 0.1, 0.5, 0.5, mean=1.0)[0]
        x = 0.6 * y + crossed(rng, 1, 6, 40, 0.1, 0.3, 0.3)[0]
        interval = fieller(x, y, 0.025)
        assert interval is not None
        means = pigeonhole([x, y], 300, i)
        low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
        hits += [interval.low < 0.6 < interval.high, low < 0.6 < high]
    return tuple(hits / runs)


def test_coverage_of_fieller_and_bootstrap(rng):
    by_fieller, by_bootstrap = coverage(rng, 400)
    assert 0.92 <= by_fieller <= 0.99
    assert 0.88 <= by_bootstrap <= 0.995


def test_bounds_of_a_share_are_wilsons(rng):
    """One column of independent draws a seed: of 0 and 1, the interval of the binomial; never beyond 0 and 1."""
    for p, n in ((0.5, 200), (0.03, 400)):
        z = np.tile((rng.random(n) < p).astype(float), (3, 1))
        low, high = share_bounds(z, 0.025)
        t = stats.t.isf(0.025, crossed_mean(z).nu)
        size = z.mean() * (1 - z.mean()) / crossed_mean(z).se ** 2
        roots = np.roots([1 + t**2 / size, -2 * z.mean() - t**2 / size, z.mean() ** 2])
        assert (low, high) == pytest.approx(sorted(roots))
        assert size == pytest.approx(n, rel=0.01)
        assert 0 < low < z.mean() < high < 1
    expected = stats.binomtest(20, 20).proportion_ci(0.95, method="wilson")
    assert share_bounds(np.ones((3, 20)), 0.025) == pytest.approx((expected.low, 1.0), abs=0.02)
    assert share_bounds(np.ones((1, 20)), 0.025) is None
    assert share_bounds(np.full((3, 20), 0.4), 0.025) is None


# Bootstrap


def test_pigeonhole_is_that_of_plain_resampling(rng):
    """Reference: rows and columns drawn with replacement one draw at a time."""
    z = crossed(rng, 1, 4, 25, 0.5, 1.0, 0.5)[0]
    means = pigeonhole([z, 2 * z], 20_000, 1)
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0])
    slow = [z[np.ix_(rng.integers(4, size=4), rng.integers(25, size=25))].mean() for _ in range(20_000)]
    assert means[:, 0].mean() == pytest.approx(np.mean(slow), abs=0.01)
    assert means[:, 0].std() == pytest.approx(np.std(slow), rel=0.03)


def test_tokens_of_a_request_are_no_requests_of_their_own(rng):
    """A slow request is slow in all its tokens: a bound that counts tokens misses the p95 again and again."""
    requests, tokens, q = 80, 30, 0.95
    slow = np.where(rng.random((400, requests, 1)) < 0.03, 2.0, 1.0)
    runs = (slow * np.exp(rng.normal(0, 0.03, (400, requests, tokens)))).reshape(400, -1)
    true = np.quantile(np.where(rng.random(10**6) < 0.03, 2.0, 1.0) * np.exp(rng.normal(0, 0.03, 10**6)), q)
    missed = [
        np.mean([quantile_bounds(run, q, 0.05, each)[1] < true for run in runs]) for each in (1, tokens)
    ]
    assert missed[0] > 0.1
    assert missed[1] <= 0.05
    assert quantile_bounds(runs[0][: 58 * tokens], q, 0.05, tokens)[1] is None, "58 requests have no bound"


def test_pigeonhole_sums_as_float64_would(rng):
    """Reference: the same draws, in float64."""
    z = rng.normal(1, 1, size=(3, 4, 500))
    stream = random_stream(2)
    seeds = stream.multinomial(4, np.full(4, 1 / 4), size=200) / 4
    weights = POISSON.astype(float)[stream.integers(len(POISSON), size=(200, 500), dtype=np.uint16)]
    expected = np.einsum("ns,nc,ksc->nk", seeds, weights, z) / weights.sum(1)[:, None]
    np.testing.assert_allclose(pigeonhole(z, 200, 2), expected, rtol=1e-5)


@pytest.mark.parametrize("documents", [1, 2, 3])
def test_pigeonhole_of_a_handful_of_documents_is_finite(documents):
    """A document's weight is 0 in a third of all draws: a draw of none says nothing."""
    means = pigeonhole([np.arange(2.0 * documents).reshape(2, documents)], 5_000, 1)
    assert np.isfinite(means).all()
    assert means.mean() == pytest.approx(documents - 0.5, abs=0.05)


def test_pigeonhole_is_seeded_and_independent_of_chunks(monkeypatch, rng):
    z = rng.normal(size=(3, 4, 50))
    np.testing.assert_array_equal(pigeonhole(z, 100, 3), pigeonhole(z, 100, 3))
    assert not np.array_equal(pigeonhole(z, 100, 3), pigeonhole(z, 100, 4))
    monkeypatch.setattr("eval.stats.ratios.CHUNK", 500)
    assert pigeonhole(z, 4000, 3).std(0) == pytest.approx(pigeonhole(z, 4000, 5).std(0), rel=0.1)


# Several claims


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


# Latency


@pytest.mark.parametrize(
    ("q", "alpha", "needed"), [(0.99, 0.01, 459), (0.99, 0.05, 299), (0.95, 0.05, 59), (0.5, 0.05, 5)]
)
def test_requests_needed(q, alpha, needed):
    assert requests_needed(q, alpha) == needed
    assert quantile_bounds(np.arange(needed - 1), q, alpha)[1] is None
    assert quantile_bounds(np.arange(needed), q, alpha)[1] == needed - 1


@pytest.mark.parametrize("q", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("n", [5, 20, 60, 300, 2000])
def test_order_statistics_against_the_binomial(q, n):
    """By definition: the least k with P(Bin(n, q) < k) >= 0.95, the greatest k with P(Bin(n, q) >= k) >= 0.95."""
    below = [k for k in range(1, n + 1) if stats.binom.cdf(k - 1, n, q) >= 0.95]
    above = [k for k in range(1, n + 1) if stats.binom.sf(k - 1, n, q) >= 0.95]
    low, high = quantile_bounds(np.arange(1, n + 1), q, 0.05)
    assert high == (min(below) if below else None)
    assert low == (max(above) if above else None)


def test_order_statistic_covers_the_true_quantile(rng):
    true = stats.lognorm.ppf(0.95, 0.5)
    samples = rng.lognormal(0, 0.5, size=(3000, 120))
    bounds = [quantile_bounds(x, 0.95, 0.05) for x in samples]
    assert np.mean([low <= true for low, _ in bounds]) >= 0.94
    assert np.mean([high >= true for _, high in bounds]) >= 0.94


def test_ratio_of_paired_rounds_cancels_what_slows_both():
    slow = np.array([1.0, 1.5, 0.8, 2.0])
    bounds = ratio_bounds(0.7 * slow, slow, 0.05)
    assert bounds == pytest.approx((0.7, 0.7, 0.7))
    assert ratio_bounds(slow, slow, 0.05) == (1.0, 1.0, 1.0)
    assert ratio_bounds([1.0], [2.0], 0.05) is None
    logs = np.log([0.7, 0.8, 0.75, 0.9])
    half = stats.t.isf(0.05, 3) * stats.sem(logs)
    assert ratio_bounds(np.exp(logs) * slow, slow, 0.05).high == pytest.approx(np.exp(logs.mean() + half))
