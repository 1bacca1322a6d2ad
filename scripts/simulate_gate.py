"""How often does the gate's test err? False PASS at a true share of exactly f, power, and placebo studies.

`python -m scripts.simulate_gate [--draws 20000] [--json FILE]` prints four tables. Scores are simulated
per seed and document in bits, documents have unequal sizes, and the tests are those of eval.statistics.
One point is 0.01 bits/byte; the teacher's gain is 12 points, f is 0.5, alpha is 0.05.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.special import stdtrit

from eval.artifacts import write_text
from eval.errors import entry
from eval.power import Components, components, power
from eval.statistics import MeanSquares, crossed_variance, linearised, mean_products

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
F, ALPHA, GAIN, DOCUMENTS = 0.5, 0.05, 12.0, 64
SEEDS, CHUNK, SEED = (3, 5, 10), 500, 20260101
WORST_DRAWS = 40_000  # a maximum over noisy rates is too large


@dataclass(frozen=True)
class Scenario:
    """Standard deviations in points of one arm's gain over its seeds, documents and their interaction."""

    name: str
    seeds: float
    documents: float = 3.0
    residual: float = 3.0
    skewed: bool = False  # documents and residuals from an exponential distribution instead of a normal one


SCENARIOS = [
    Scenario("seeds agree", 0.0),
    Scenario("mild", 0.3),
    Scenario("medium", 0.6),
    Scenario("severe", 1.2),
    Scenario("severe, documents agree", 1.2, 0.3, 1.0),
    Scenario("severe, little noise", 1.2, 1.5, 0.3),
    Scenario("medium, skewed documents", 0.6, skewed=True),
]
TESTS = ("crossed", "documents only", "seeds only")


def spread(rng: np.random.Generator, scale: float, shape: tuple[int, ...], skewed: bool) -> Array:
    return scale * (rng.exponential(size=shape) - 1 if skewed else rng.normal(size=shape))


def arm(rng: np.random.Generator, of: Scenario, mean: float, n: int, s: int) -> Array:
    """[n, S, C] gain of one pair of arms in points."""
    return (
        mean
        + rng.normal(0, of.seeds, (n, s, 1))
        + spread(rng, of.documents, (n, 1, DOCUMENTS), of.skewed)
        + spread(rng, of.residual, (n, s, DOCUMENTS), of.skewed)
    )


def tables(of: Scenario, gain: float, share: float, s: int, draws: int) -> Iterator[tuple[Array, Array]]:
    """Linearised tables of T1 - T0 and S1v - S0v, `draws` studies in chunks of [n, S, C]."""
    rng = np.random.default_rng(SEED)
    for start in range(0, draws, CHUNK):
        n = min(CHUNK, draws - start)
        size = rng.lognormal(8, 0.6, DOCUMENTS)
        teacher, kept = arm(rng, of, gain, n, s), arm(rng, of, share * gain, n, s)
        yield linearised(teacher * size, size), linearised(kept * size, size)


def crossed(z: Array) -> Flags:
    """[n] bool: lower bound above 0 by the gate's own test."""
    variance, nu = crossed_variance(mean_products(z, z), *z.shape[-2:])
    return z.mean((-2, -1)) > -stdtrit(nu, ALPHA) * np.sqrt(variance)


def one_way(z: Array, axis: int) -> Flags:
    """[n] bool: a t test over the means along `axis`, as if only these had been sampled."""
    means = z.mean(axis)
    count = means.shape[-1]
    bound = -stdtrit(count - 1, ALPHA) * means.std(-1, ddof=1) / np.sqrt(count)
    return means.mean(-1) > bound


def false_pass(of: Scenario, s: int, draws: int) -> dict[str, float]:
    """Share of studies that pass although exactly f is kept, for the crossed test and two naive ones."""
    hits = np.zeros(3)
    for teacher, kept in tables(of, GAIN, F, s, draws):
        lost = kept - F * teacher
        hits += [crossed(lost).sum(), one_way(lost, -2).sum(), one_way(lost, -1).sum()]
    return dict(zip(TESTS, (hits / draws).tolist(), strict=True))


def drawn_mean_squares(
    rng: np.random.Generator, parts: Components, s: int, c: int, draws: int
) -> tuple[Array, MeanSquares]:
    """Means and mean squares of `draws` normal crossed tables with mean 0, without making the tables."""
    expected, degrees = parts.mean_squares(s, c), (s - 1, c - 1, (s - 1) * (c - 1))
    squares = [m * rng.chisquare(d, draws) / d for m, d in zip(expected, degrees, strict=True)]
    variance = (expected.seeds + expected.documents - expected.residual) / (s * c)
    return rng.normal(0, np.sqrt(variance), draws), MeanSquares(*squares)


def worst_case(s: int) -> dict[str, float]:
    """Largest false PASS rate over mixtures of documents and variances, with and without the cap of nu."""
    rng, worst = np.random.default_rng(SEED), np.zeros(2)
    for c, *deviations in product((64, 500), (0.1, 0.2, 0.5, 1), (0.1, 0.3, 1), (0.05, 0.5)):
        parts = Components(*(d**2 for d in deviations))
        mean, ms = drawn_mean_squares(rng, parts, s, c, WORST_DRAWS)
        variance, nu = crossed_variance(ms, s, c)
        spread = sum(m**2 / d for m, d in zip(ms, (s - 1, c - 1, (s - 1) * (c - 1)), strict=True))
        free = np.maximum((variance * s * c) ** 2 / spread, 1)
        rates = [(mean > -stdtrit(n, ALPHA) * np.sqrt(variance)).mean() for n in (nu, free)]
        worst = np.maximum(worst, rates)
    return {"crossed": float(worst[0]), "without the cap": float(worst[1])}


def power_curve(of: Scenario, s: int, share: float, draws: int) -> dict[str, float]:
    """Share of studies that pass with `share` kept, beside what eval.power foretells from the variances."""
    hits = 0
    pilots: list[Components] = []
    for teacher, kept in tables(of, GAIN, share, s, draws):
        lost = kept - F * teacher
        hits += int(crossed(lost).sum())
        pilots += [components(z) for z in lost[:20]]
    parts = Components(*np.mean([list(asdict(p).values()) for p in pilots], axis=0).tolist())
    return {"simulated": hits / draws, "foretold": power(parts, (share - F) * GAIN, s, DOCUMENTS, ALPHA)}


def placebo(of: Scenario, s: int, draws: int) -> int:
    """Studies that pass both assay sensitivity and retention although the method does nothing."""
    return sum(
        int((crossed(teacher) & crossed(kept - F * teacher)).sum())
        for teacher, kept in tables(of, 0.0, 0.0, s, draws)
    )


def measured(draws: int) -> dict[str, list[dict[str, object]]]:
    medium = SCENARIOS[2]
    return {
        "false_pass": [
            {"scenario": of.name, "seeds": s, **false_pass(of, s, draws)} for of in SCENARIOS for s in SEEDS
        ],
        "worst": [{"seeds": s, **worst_case(s)} for s in (2, *SEEDS)],
        "power": [
            {"share": share, "seeds": s, **power_curve(medium, s, share, max(draws // 5, 1))}
            for share in (0.55, 0.6, 0.65, 0.7, 0.8)
            for s in SEEDS
        ],
        "placebo": [{"seeds": s, "studies": 200, "passed": placebo(medium, s, 200)} for s in SEEDS],
    }


def table(title: str, rows: list[dict[str, object]]) -> Table:
    shown = Table(title=title, title_justify="left")
    for name in rows[0]:
        shown.add_column(name, justify="left" if name == "scenario" else "right")
    for row in rows:
        shown.add_row(
            *(f"{v:.1%}" if isinstance(v, float) and k != "share" else str(v) for k, v in row.items())
        )
    return shown


@entry
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.simulate_gate", description=__doc__)
    parser.add_argument("--draws", type=int, default=20_000, help="simulated studies per figure")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    result = measured(args.draws)
    console = Console()
    console.print(table("False PASS at a true share of exactly f, nominal 5 %", result["false_pass"]))
    console.print(table("The same, worst of 48 mixtures", result["worst"]))
    console.print(table("PASS by true share, medium", result["power"]))
    console.print(table("Placebo: PASS of 200 studies, medium", result["placebo"]))
    if args.json:
        write_text(args.json, json.dumps({"draws": args.draws, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
