"""What `scripts.simulate_gate` simulates beside the test of one share: documents in clusters, several parts,
several variants."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from eval.cost.estimates import largest_ratio
from eval.stats.crossed import MeanSquares, cluster_bounds, crossed_variance, linearise, mean_squares
from eval.stats.quantiles import percentile_bounds, quantile_bounds, requests_needed
from eval.stats.ratios import ratio_bounds

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Row = dict[str, object]
ALPHA, CHUNK, SEED = 0.05, 500, 20260101


def passes_crossed(z: Array) -> Flags:
    """[n] bool: lower bound above 0 by the gate's own test, of tables [n, S, C]."""
    variance, nu = crossed_variance(mean_squares(z), *z.shape[-2:])
    return exceeds(z.mean((-2, -1)), variance, nu)


def exceeds(mean: Array, variance: Array, nu: Array) -> Flags:
    return mean > -stdtrit(nu, ALPHA) * np.sqrt(variance)


def satterthwaite(ms: MeanSquares, variance: Array, s: int, c: int) -> Array:
    """Degrees of freedom of the variance that is used, before they are bounded."""
    return (variance * s * c) ** 2 / sum(
        m**2 / d for m, d in zip(ms, (s - 1, c - 1, (s - 1) * (c - 1)), strict=True)
    )


def chunks(draws: int) -> Iterator[int]:
    """Numbers of studies that are simulated at once."""
    for start in range(0, draws, CHUNK):
        yield min(CHUNK, draws - start)


@dataclass(frozen=True)
class Clustered:
    """Documents in clusters of unequal size; `icc` of the variance of a document's gain is its cluster's."""

    clusters: int
    documents: float  # to a cluster, on average
    icc: float


CLUSTERED = [Clustered(c, n, icc) for c, n in ((6, 8), (16, 4), (40, 2)) for icc in (0.0, 0.2, 0.3)]
CLUSTER_SEEDS = (3, 4, 5, 10)


def clustered_effects(
    rng: np.random.Generator, shape: tuple[int, ...], cluster: NDArray[np.intp], icc: float
) -> Array:
    """[*shape, N] normal effects of documents, correlated by `icc` within their clusters, variance 1."""
    own = rng.normal(size=(*shape, len(cluster)))
    common = rng.normal(size=(*shape, int(cluster[-1]) + 1))[..., cluster]
    return icc**0.5 * common + (1 - icc) ** 0.5 * own


def clustered_false_pass(scenario: Clustered, s: int, draws: int) -> dict[str, float]:
    """False PASS where the true mean is 0: documents taken for independent, and summed by cluster.

    Effects of seeds, documents and their interaction are those of a medium study: 0.6, 3 and 3 points for
    each of two arms; documents have unequal bytes.
    """
    rng, hits = np.random.default_rng([SEED, s, scenario.clusters, int(scenario.icc * 100)]), np.zeros(2)
    for n in chunks(draws):
        sizes = 1 + rng.poisson(scenario.documents - 1, scenario.clusters)
        cluster = np.repeat(np.arange(scenario.clusters), sizes)
        size, starts = rng.lognormal(8, 0.6, len(cluster)), np.searchsorted(cluster, np.arange(len(sizes)))
        gain = 0.6 * rng.normal(size=(n, s, 1))
        gain = gain + 3 * clustered_effects(rng, (n, 1), cluster, scenario.icc)
        gain = gain + 3 * clustered_effects(rng, (n, s), cluster, scenario.icc)
        bits = gain * size
        by_cluster = linearise(np.add.reduceat(bits, starts, axis=-1), np.add.reduceat(size, starts))
        hits += [passes_crossed(linearise(bits, size)).sum(), passes_crossed(by_cluster).sum()]
    return dict(zip(("by document", "by cluster"), (hits / draws).tolist(), strict=True))


def cluster_rows(draws: int) -> list[Row]:
    return [
        {
            "scenario": f"{scenario.clusters} clusters of {scenario.documents}, correlation {scenario.icc}",
            "seeds": s,
            **clustered_false_pass(scenario, s, draws),
        }
        for scenario in CLUSTERED
        for s in CLUSTER_SEEDS
    ]


PARTS, FAIL_SEEDS = (4, 6, 9), (3, 5, 10)


def medium_tables(
    rng: np.random.Generator, shape: tuple[int, ...], s: int, scale: float = 1.0, clusters: int = 64
) -> Array:
    """[*shape, S, C] gains of a pair of arms with mean 0, in points: the effects of a medium study."""
    seeds = 0.6 * rng.normal(size=(*shape, s, 1))
    documents, rest = (3 * rng.normal(size=(*shape, n, clusters)) for n in (1, s))
    return scale * (seeds + documents + rest)


def crossed_p(z: Array) -> Array:
    """One-sided p-values of "the mean is at most 0", of tables [..., S, C]."""
    variance, nu = crossed_variance(mean_squares(z), *z.shape[-2:])
    return stdtr(nu, -z.mean((-2, -1)) / np.sqrt(variance))


def holm_rows(p: Array) -> Array:
    """[n, K] Holm's adjusted p-values of each row of p."""
    order = np.argsort(p, axis=-1)
    scaled = np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(np.maximum.accumulate(scaled, -1), 1), -1)
    return adjusted


def false_fail(parts: int, s: int, draws: int) -> dict[str, float]:
    """False FAIL where every part holds exactly at its limit: of any part alone, and after Holm over them.

    Half of the variance of a part's table is that of the teacher's gain, which all parts share.
    """
    rng, hits = np.random.default_rng([SEED, parts, s]), np.zeros(2)
    for n in chunks(draws):
        common = medium_tables(rng, (n, 1), s, 0.5**0.5)
        p = crossed_p(-common - medium_tables(rng, (n, parts), s, 0.5**0.5))
        hits += [(p <= ALPHA).any(-1).sum(), (holm_rows(p) <= ALPHA).any(-1).sum()]
    return dict(zip(("any part alone", "Holm over the parts"), (hits / draws).tolist(), strict=True))


def fail_rows(draws: int) -> list[Row]:
    return [{"parts": k, "seeds": s, **false_fail(k, s, draws)} for k in PARTS for s in FAIL_SEEDS]


@dataclass(frozen=True)
class Pick:
    """Three variants to pick from: the teacher's gain in points, and what each keeps beyond what is asked."""

    name: str
    gain: float
    surplus: tuple[float, float, float]


PICKS = [
    Pick("no gain, all keep much", 0.0, (6.0, 6.0, 6.0)),
    Pick("a gain, none keeps enough", 12.0, (0.0, 0.0, 0.0)),
    Pick("a gain, one does not keep enough", 12.0, (6.0, 6.0, 0.0)),
    Pick("a small gain, all keep it", 1.6, (1.9, 1.9, 1.9)),
]


def picks(case: Pick, s: int, draws: int) -> dict[str, float]:
    """Claims by Holm over the variants' largest p, and by the shared test first, then Holm over their own."""
    rng, hits = np.random.default_rng([SEED, s, len(case.name)]), np.zeros(4)
    surplus = np.asarray(case.surplus)
    true = (surplus > 0) & (case.gain > 0)
    for n in chunks(draws):
        teacher, student = medium_tables(rng, (2, n, 1), s)
        own = medium_tables(rng, (n, 3), s, 0.3) + student - 0.5 * teacher + surplus[:, None, None]
        shared, p = crossed_p(teacher + case.gain), crossed_p(own)
        together = (np.maximum(shared, p) <= ALPHA) & (holm_rows(np.maximum(shared, p)) <= ALPHA)
        in_series = (shared <= ALPHA) & (holm_rows(p) <= ALPHA)
        claims = [
            (claimed & kind).any(-1).sum() for kind in (~true, true) for claimed in (together, in_series)
        ]
        hits += claims
    names = ("false, together", "false, in series", "right, together", "right, in series")
    return dict(zip(names, (hits / draws).tolist(), strict=True))


def pick_rows(draws: int) -> list[Row]:
    return [{"scenario": c.name, "seeds": s, **picks(c, s, draws)} for c in PICKS for s in (3, 5)]


WITHIN = 0.05


@dataclass(frozen=True)
class Tail:
    """Latencies of processes: standard deviations of the logarithm, and the share of slow requests."""

    processes: int
    requests: int  # of each
    between: float
    within: float
    slow: float = 0.0  # of them: their logarithm is longer by an exponential of mean 0.5

    @property
    def name(self) -> str:
        requests = "" if self.within == WITHIN else f", requests by {self.within}"
        apart = f"{self.processes} processes of {self.requests}, apart by {self.between}"
        return f"{apart}{requests}, {self.slow:.0%} slow"


TAILS = [
    Tail(processes, requests, between, WITHIN, slow)
    for processes in (3, 5, 10)
    for requests in (24, 120)
    for between in (0.0, 0.03, 0.1)
    for slow in (0.0, 0.03)
]
TAILS += [  # as processes and requests of the default study differ: see scripts/simulation/spread.py
    Tail(processes, requests, between, 0.16)
    for processes in (3, 5, 10)
    for requests in (24, 120)
    for between in (0.08, 0.19)
]


def draw_latencies(rng: np.random.Generator, tail: Tail, s: int, n: int) -> Array:
    """[s, n] latencies in units of their median."""
    slow = np.where(rng.random((s, n)) < tail.slow, rng.exponential(0.5, (s, n)), 0.0)
    residual = tail.within * rng.normal(size=(s, n)) + slow
    return np.exp(tail.between * rng.normal(size=(s, 1)) + residual)


def mean_percentile_bound(processes: Array, q: float) -> float:
    """What bounded a percentile before: the order statistic of all, or the t bound of the processes' own."""
    _, high = quantile_bounds(processes.ravel(), q, ALPHA)
    between = cluster_bounds(np.quantile(processes, q, axis=1), ALPHA)
    return np.inf if high is None or between is None else max(high, between[1])


def tail_misses(tail: Tail, q: float, draws: int) -> Row:
    """How often an upper bound lies below the percentile of all processes; how far above the new one lies."""
    rng = np.random.default_rng([SEED, tail.processes, tail.requests, int(100 * tail.between), int(100 * q)])
    true = float(np.quantile(draw_latencies(rng, tail, 400_000, 1), q))
    misses, above = np.zeros(2), []
    for _ in range(draws):
        latencies = draw_latencies(rng, tail, tail.processes, tail.requests)
        high = percentile_bounds(list(latencies), q, ALPHA)[1] or np.inf
        misses += [mean_percentile_bound(latencies, q) < true, high < true]
        above.append(high / true)
    rates = dict(zip(("mean of percentiles", "of all processes"), (misses / draws).tolist(), strict=True))
    return {**rates, "bound / truth": f"{np.median(above):.2f}"}


def tail_rows(draws: int) -> list[Row]:
    return [
        {
            "scenario": t.name,
            "percentile": f"p{100 * q:.0f}",
            **tail_misses(t, q, draws),
        }
        for t in TAILS
        for q in (0.95, 0.99)
        if t.processes * t.requests >= requests_needed(q, ALPHA)
    ]


SIZE_SPREADS = ((0.003, 0.003), (0.01, 0.01), (0.03, 0.03), (0.1, 0.01))
PROCESSES = 5


def size_misses(spreads: tuple[float, float], draws: int) -> dict[str, object]:
    """How often an upper bound of the ratio of two sizes lies below that of the expected largest of five.

    Sizes are log-normal over processes, with these standard deviations of the logarithm. "Of means" is the
    bound of the ratio of geometric means, "of the largest" what the gate takes.
    """
    rng = np.random.default_rng([SEED, *(int(1000 * spread) for spread in spreads)])
    ours, theirs, new, other = (
        np.exp(spread * rng.normal(size=(n, PROCESSES)))
        for n, spread in (
            (draws, spreads[0]),
            (draws, spreads[1]),
            (100_000, spreads[0]),
            (100_000, spreads[1]),
        )
    )
    truth = float(new.max(1).mean() / other.max(1).mean())
    pairs = list(zip(ours, theirs, strict=True))
    means, largest = (
        np.array([share.high for x, y in pairs if (share := bounds(x, y, ALPHA))])
        for bounds in (ratio_bounds, largest_ratio)
    )
    return {
        "of means": float((means < truth).mean()),
        "of the largest": float((largest < truth).mean()),
        "bound / truth": f"{np.median(largest) / truth:.3f}",
    }


def size_rows(draws: int) -> list[Row]:
    return [
        {"scenario": f"5 processes, apart by {a:g} and {b:g}", **size_misses((a, b), draws)}
        for a, b in SIZE_SPREADS
    ]
