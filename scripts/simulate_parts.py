"""What `scripts.simulate_gate` simulates beside the test of one share: documents in clusters."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from eval.stats.crossed import crossed_variance, linearise, mean_squares

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Row = dict[str, object]
ALPHA, CHUNK, SEED = 0.05, 500, 20260101


def passes_crossed(z: Array) -> Flags:
    """[n] bool: lower bound above 0 by the gate's own test, of tables [n, S, C]."""
    variance, nu = crossed_variance(mean_squares(z), *z.shape[-2:])
    return z.mean((-2, -1)) > -stdtrit(nu, ALPHA) * np.sqrt(variance)


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
