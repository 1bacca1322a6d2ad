"""How often does the gate's test err? False PASS at a true share of exactly f, power, and placebo studies.

`python -m scripts.simulate_gate [--draws 20000] [--tables NAME ...] [--json FILE]` prints its tables.
Scores are simulated per seed and document in bits, documents have unequal sizes, and the tests are those of
eval.stats.crossed.
One point is 0.01 bits/byte; the teacher's gain is 12 points, f is 0.5, alpha is 0.05.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from eval.core.commands import add_json, count, write_json
from eval.core.errors import entry, require_one_of
from eval.gate.quality import RESOLUTION, mean_part
from eval.gate.verdicts import hold_failures, join_verdicts
from eval.stats.crossed import MeanSquares, crossed_variance, linearise, mean_squares
from eval.stats.power import Components, components, power
from scripts.simulation.parts import (
    ALPHA,
    SEED,
    Array,
    Flags,
    chunks,
    cluster_rows,
    exceeds,
    fail_rows,
    passes_crossed,
    pick_rows,
    satterthwaite,
    size_rows,
    tail_rows,
)
from scripts.simulation.watch import look_rows, returning_rows

F, GAIN, DOCUMENTS = 0.5, 12.0, 64
SEEDS = (3, 5, 10)
MANY, FEW = (16, 64, 500), (2, 3, 6)  # documents, or clusters of them
WORST = 10  # times the draws for the worst case, once it is found
STUDIES, HARM = 200, 3.0  # placebo and harmful studies; points by which a harmful method harms


@dataclass(frozen=True)
class Scenario:
    """Standard deviations in points of one arm's gain over its seeds, documents and their interaction."""

    name: str
    seeds: float
    documents: float = 3.0
    residual: float = 3.0
    skew: int = 0  # sign of the skew of documents and residuals: exponential in place of normal
    length: float = 0.6  # standard deviation of the logarithm of a document's bytes
    seed_skew: int = 0  # the same of seeds
    shared: bool = False  # all seeds have one teacher


@dataclass(frozen=True)
class Mixture:
    """Shares of the variance of the mean by origin, in a table of so many documents."""

    document_count: int
    seeds: float
    documents: float
    residual: float


SCENARIOS = [
    Scenario("seeds agree", 0.0),
    Scenario("mild", 0.3),
    Scenario("medium", 0.6),
    Scenario("severe", 1.2),
    Scenario("severe, documents agree", 1.2, 0.3, 1.0),
    Scenario("severe, little noise", 1.2, 1.5, 0.3),
    Scenario("medium, long tail of gains", 0.6, skew=1),
    Scenario("medium, very unequal lengths", 0.6, length=1.2),
]
BEYOND = [  # what the test does not allow for
    Scenario("medium, long tail of losses", 0.6, skew=-1),
    Scenario("severe, little noise, a few bad seeds", 1.2, 1.5, 0.3, seed_skew=-1),
    Scenario("severe, one teacher for all seeds", 1.2, shared=True),
]
MEDIUM, SEVERE = SCENARIOS[2], SCENARIOS[3]
TESTS = ("crossed", "documents only", "seeds only")


def draw_effects(rng: np.random.Generator, scale: float, shape: tuple[int, ...], skew: int) -> Array:
    """Mean 0; exponential with the long tail to the side of `skew`, or normal."""
    return scale * (skew * (rng.exponential(size=shape) - 1) if skew else rng.normal(size=shape))


def draw_gains(
    rng: np.random.Generator, scenario: Scenario, mean: float, n: int, s: int, shared: bool = False
) -> Array:
    """[n, S, C] gain of one pair of arms in points; `shared` seeds have one draw of its effect."""
    seeds = draw_effects(rng, scenario.seeds, (n, 1 if shared else s, 1), scenario.seed_skew)
    return (
        mean
        + seeds
        + draw_effects(rng, scenario.documents, (n, 1, DOCUMENTS), scenario.skew)
        + draw_effects(rng, scenario.residual, (n, s, DOCUMENTS), scenario.skew)
    )


def draw_tables(
    scenario: Scenario, gain: float, share: float, s: int, draws: int
) -> Iterator[tuple[Array, Array]]:
    """Linearised tables of T1 - T0 and S1v - S0v, `draws` studies in chunks of [n, S, C]."""
    rng = np.random.default_rng(SEED)
    for n in chunks(draws):
        size = rng.lognormal(8, scenario.length, DOCUMENTS)
        teacher = draw_gains(rng, scenario, gain, n, s, scenario.shared)
        student = draw_gains(rng, scenario, share * gain, n, s)
        yield linearise(teacher * size, size), linearise(student * size, size)


def passes_one_way(z: Array, axis: int) -> Flags:
    """[n] bool: a t test over the means along `axis`, as if only these had been sampled."""
    means = z.mean(axis)
    count = means.shape[-1]
    bound = -stdtrit(count - 1, ALPHA) * means.std(-1, ddof=1) / np.sqrt(count)
    return means.mean(-1) > bound


def false_pass_rates(scenario: Scenario, s: int, draws: int) -> dict[str, float]:
    """Share of studies that pass although exactly f is kept, for the crossed test and two naive ones."""
    hits = np.zeros(3)
    for teacher, student in draw_tables(scenario, GAIN, F, s, draws):
        excess = student - F * teacher
        hits += [
            passes_crossed(excess).sum(),
            passes_one_way(excess, -2).sum(),
            passes_one_way(excess, -1).sum(),
        ]
    return dict(zip(TESTS, (hits / draws).tolist(), strict=True))


def draw_mean_squares(
    rng: np.random.Generator, parts: Components, s: int, c: int, draws: int
) -> tuple[Array, MeanSquares]:
    """Means and mean squares of `draws` normal crossed tables with mean 0, without making the tables."""
    expected, degrees = parts.mean_squares(s, c), (s - 1, c - 1, (s - 1) * (c - 1))
    squares = [m * rng.chisquare(d, draws) / d for m, d in zip(expected, degrees, strict=True)]
    variance = (expected.seeds + expected.documents - expected.residual) / (s * c)
    return rng.normal(0, np.sqrt(variance), draws), MeanSquares(*squares)


def mixture_false_pass(rng: np.random.Generator, s: int, mixture: Mixture, draws: int) -> dict[str, float]:
    """False PASS of a normal crossed table, and of other bounds of nu than those of the gate."""
    c = mixture.document_count
    parts = Components(s * mixture.seeds, mixture.documents * c, mixture.residual * s * c)
    mean, ms = draw_mean_squares(rng, parts, s, c, draws)
    variance, nu = crossed_variance(ms, s, c)
    free = np.maximum(satterthwaite(ms, variance, s, c), 1)
    few, seeds = 2 * (min(s, c) - 1), 2 * (s - 1)
    bounded = {
        "crossed": nu,
        "nu from 1": np.minimum(free, few),
        "cap of seeds alone": np.clip(free, min(s, c) - 1, seeds),
        "without the cap": free,
    }
    return {name: float(exceeds(mean, variance, n).mean()) for name, n in bounded.items()}


def find_worst_mixture(s: int, draws: int, counts: tuple[int, ...] = MANY) -> dict[str, object]:
    """The mixture of variances with the largest false PASS rate, looked for and then simulated anew.

    The rate that made it the worst is too large by its own luck; fresh draws are free of that.
    """
    rng = np.random.default_rng([SEED, s])
    grid = [
        Mixture(c, seeds, 1 - seeds - residual, residual)
        for c, seeds, residual in product(counts, np.arange(11) / 10, (0, 0.01, 0.05, 0.2))
        if seeds + residual <= 1
    ]
    worst = max(grid, key=lambda mixture: mixture_false_pass(rng, s, mixture, draws)["crossed"])
    name = f"{worst.seeds:.0%} seeds, {worst.residual:.0%} residual, {worst.document_count} documents"
    return {"seeds": s, "scenario": name, **mixture_false_pass(rng, s, worst, WORST * draws)}


def measure_power(scenario: Scenario, s: int, share: float, draws: int) -> dict[str, float]:
    """Share of studies that pass with `share` kept, beside what eval.gate.power predicts."""
    hits, before = 0, 0
    pilots: list[Components] = []
    for teacher, student in draw_tables(scenario, GAIN, share, s, draws):
        excess = student - F * teacher
        ms, mean = mean_squares(excess), excess.mean((-2, -1))
        variance, nu = crossed_variance(ms, s, DOCUMENTS)
        free = np.clip(satterthwaite(ms, variance, s, DOCUMENTS), 1, 2 * (s - 1))
        hits += int(exceeds(mean, variance, nu).sum())
        before += int(exceeds(mean, variance, free).sum())
        pilots += [components(z) for z in excess[:20]]
    parts = Components(*np.mean([list(asdict(p).values()) for p in pilots], axis=0).tolist())
    predicted = power(parts, (share - F) * GAIN, s, DOCUMENTS, ALPHA)
    return {"simulated": hits / draws, "nu from 1": before / draws, "predicted": float(predicted)}


def count_verdicts(scenario: Scenario, s: int, gain: float, share: float, studies: int) -> dict[str, int]:
    """How often the gate's own parts, assay and retention joined, say PASS, FAIL and INCONCLUSIVE."""
    counts: Counter[str] = Counter(PASS=0, FAIL=0, INCONCLUSIVE=0)
    for teacher, student in draw_tables(scenario, gain, share, s, studies):
        for t, k in zip(teacher / 100, student / 100, strict=True):
            parts = [
                mean_part("assay", t, ALPHA, "", "", RESOLUTION),
                mean_part("retention", k - F * t, ALPHA, "", ""),
            ]
            counts[join_verdicts(hold_failures(parts, ALPHA))] += 1
    return dict(counts)


def verdict_rows(gain: float) -> list[dict[str, object]]:
    """Studies of a method with this true gain in points, all of which the student keeps."""
    return [
        {
            "scenario": scenario.name,
            "seeds": s,
            "studies": STUDIES,
            **count_verdicts(scenario, s, gain, 1.0, STUDIES),
        }
        for scenario in (MEDIUM, SEVERE)
        for s in SEEDS
    ]


def tables(draws: int) -> dict[str, Callable[[], list[dict[str, object]]]]:
    """Name -> what simulates the rows of a table, with `draws` studies a figure, or a stated part of them."""

    def rates(scenarios: list[Scenario]) -> list[dict[str, object]]:
        return [
            {"scenario": scenario.name, "seeds": s, **false_pass_rates(scenario, s, draws)}
            for scenario in scenarios
            for s in SEEDS
        ]

    def powers() -> list[dict[str, object]]:
        return [
            {"share": share, "seeds": s, **measure_power(MEDIUM, s, share, max(draws // 5, 1))}
            for share in (0.55, 0.6, 0.65, 0.7, 0.8)
            for s in SEEDS
        ]

    return {
        "false_pass": lambda: rates(SCENARIOS),
        "beyond": lambda: rates(BEYOND),
        "clusters": lambda: cluster_rows(draws),
        "false_fail": lambda: fail_rows(max(draws // 4, 1)),
        "tails": lambda: tail_rows(max(draws // 50, 1)),
        "sizes": lambda: size_rows(max(draws // 5, 1)),
        "picks": lambda: pick_rows(max(draws // 4, 1)),
        "worst": lambda: [
            find_worst_mixture(s, draws, counts) for counts in (MANY, FEW) for s in (2, 3, 4, 5, 7, 10)
        ],
        "power": powers,
        "placebo": lambda: verdict_rows(0.0),
        "harmful": lambda: verdict_rows(-HARM),
        "looks": lambda: look_rows(max(draws // 10, 1)),
        "returning": lambda: returning_rows(max(draws // 10, 1)),
    }


def build_table(title: str, rows: list[dict[str, object]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "scenario" else "right")
    for row in rows:
        table.add_row(
            *(f"{v:.1%}" if isinstance(v, float) and k != "share" else str(v) for k, v in row.items())
        )
    return table


@entry
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.simulate_gate", description=__doc__)
    parser.add_argument("--draws", type=count, default=20_000, help="simulated studies per figure")
    add_json(parser)
    parser.add_argument("--tables", nargs="+", metavar="NAME", help="these alone (default: all)")
    args = parser.parse_args()
    known = tables(args.draws)
    names = [require_one_of("--tables", name, list(known)) for name in args.tables or known]
    result = {name: known[name]() for name in names}
    console = Console()
    error = 100 * np.sqrt(ALPHA * (1 - ALPHA) / args.draws)
    titles = {
        "false_pass": f"False PASS at a true share of exactly f, nominal 5 % (+-{error:.2f} points)",
        "beyond": "The same beyond what the test assumes",
        "clusters": "The same with documents in clusters: taken for independent, and summed by cluster",
        "false_fail": "False FAIL where every part is exactly at its limit, nominal 5 %",
        "tails": "Upper bounds of percentiles that lie below the truth, nominal 5 %",
        "sizes": "Upper bounds of the ratio of two sizes that lie below that of the expected largest",
        "picks": "A pick among three: claims of any false and of any right one, by one Holm and in series",
        "worst": "The same, worst mixture of variances",
        "power": "PASS by true share, medium",
        "placebo": "Placebo: verdicts",
        "harmful": f"Harm of {HARM:g} points: verdicts",
        "looks": "52 weekly looks at a release: called broken, and weeks until a broken one is found",
        "returning": "The same with groups that come back every week",
    }
    for name, rows in result.items():
        console.print(build_table(titles[name], rows))
    write_json(args.json, {"draws": args.draws, **result})


if __name__ == "__main__":
    main()
