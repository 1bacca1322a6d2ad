"""How often does a rollout err, and how soon does it find a fault? Streams of requests, judged by its rule.

`python -m scripts.simulate_rollout [--streams 2000] [--json FILE]` prints its tables. A stream is a
rollout in three stages, 1, 5 and 25 % of 50,000 requests an hour, with a look every hour, for a day in each
stage at most. What decides is `eval.watch.decision`, at alpha 5 % over the whole rollout.
"""

import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.special import ndtr, ndtri

from eval.core.commands import add_json, count, new_parser, write_json
from eval.core.errors import entry
from eval.stats.arms import BIN, FIRST, LEAST, Ratio, ratio_sums
from eval.watch.decision import Array, Windows, least_worse, level_of, points_of, whole_stage, worse_of
from eval.watch.routing import MeasureName, Plan

Flags = NDArray[np.bool_]
HOURLY, LOOKS, SEED, CHUNK = 50_000, 24, 20260101, 100
MANY = 2000  # sums of more texts are drawn as normal values
LOSS, NOISE, LENGTH, CUT = 2.5, 0.35, 0.8, 4000.0  # bits per byte, spread; of log bytes; most bytes
ERRORS, LATENCY, SPREAD = 0.01, 0.1, 0.35  # share, median, standard deviation of the logarithm
BINS = 400  # of latencies that occur
SURE = 1.5  # standard errors from a limit within which no bound that holds at every look says anything
PLAN = Plan.model_validate(
    {
        "name": "simulated",
        "stages": [{"share": share} for share in (0.01, 0.05, 0.25)],
        "measures": {
            "loss": {"worse_by": 0.02},
            "errors": {"worse_by": 0.01},
            "latency_p95": {"worse_by": 0.1},
        },
    }
)
LIMITS = {name: measure.worse_by for name, measure in PLAN.measures.items()}


@dataclass(frozen=True)
class Truth:
    """By how much the release is worse than the fallback."""

    name: str
    loss: float = 0.0  # bits per byte
    errors: float = 0.0  # share of requests
    latency: float = 0.0  # share of the fallback's, of every percentile
    tail: bool = False  # the loss of a text has an exponential tail
    stage: int = 1  # from this stage on; as the fallback before it
    look: int = 1  # from this look of that stage on

    def at(self, stage: int, look: int) -> "Truth":
        if (stage, look) >= (self.stage, self.look):
            return self
        return replace(self, loss=0.0, errors=0.0, latency=0.0)

    @property
    def worse(self) -> dict[str, float]:
        return {"loss": self.loss, "errors": self.errors, "latency_p95": self.latency}

    @property
    def is_bad(self) -> bool:
        """Must the stage not be promoted?"""
        return any(self.worse[name] >= limit for name, limit in LIMITS.items())

    @property
    def is_allowed(self) -> bool:
        """Must it not be rolled back?"""
        return all(self.worse[name] <= limit for name, limit in LIMITS.items())


ERRING = [
    Truth("the release is as the fallback"),
    Truth("loss at its limit", loss=0.02),
    Truth("loss at its limit, long tails", loss=0.02, tail=True),
    Truth("errors at their limit", errors=0.01),
    Truth("latency at its limit", latency=0.1),
    Truth("all at their limits", 0.02, 0.01, 0.1),
    Truth("all at their limits from stage 2 on", 0.02, 0.01, 0.1, stage=2),
]
FAULTS = [
    Truth("loss +0.05", loss=0.05),
    Truth("loss +0.1", loss=0.1),
    Truth("errors 1 % to 4 %", errors=0.03),
    Truth("errors 1 % to 10 %", errors=0.09),
    Truth("errors 1 % to 50 %", errors=0.49),
    Truth("latency +25 %", latency=0.25),
    Truth("latency +100 %", latency=1.0),
    Truth("loss +0.05 from look 4 of stage 1 on", loss=0.05, look=4),
    Truth("loss +0.05 from stage 3 on", loss=0.05, stage=3),
    Truth("errors 1 % to 4 % from stage 3 on", errors=0.03, stage=3),
    Truth("latency +25 % from stage 3 on", latency=0.25, stage=3),
]


@dataclass(frozen=True)
class Ends:
    """How each of n streams went."""

    promoted: Array  # [n] stages that were promoted
    back: Array  # [n] whether it was rolled back
    hours: Array  # [n] from the start to its end
    faulty: Array  # [n] of them with the fault
    answered: Array  # [n] requests that the release answered until then
    naive: Array  # [n] whether a plain test at each look would have promoted a bad stage


@cache
def bins_of(worse: float) -> Array:
    """[BINS] chance of each bin of a latency."""
    edges = FIRST + BIN * np.arange(1, BINS)
    below = ndtr((edges - np.log(LATENCY * (1 + worse))) / SPREAD)
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def texts(rng: np.random.Generator, loss: float, tail: bool, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Bits and bytes of texts, which are cut as those of a study are."""
    size = np.minimum(np.exp(rng.standard_normal(shape) * LENGTH + 7), CUT)
    noise = rng.standard_exponential(shape) - 1 if tail else rng.standard_normal(shape)
    return size * (loss + NOISE * noise), size


@cache
def moments(loss: float, tail: bool) -> tuple[Array, Array]:
    """Mean and covariance of what is summed of a text, by a million of them."""
    x, y = texts(np.random.default_rng(SEED), loss, tail, (10**6,))
    values = np.stack([x, y, x * x, x * y, y * y])
    return values.mean(1), np.cov(values)


def loss_sums(rng: np.random.Generator, loss: float, tail: bool, streams: int, requests: int) -> Ratio:
    """[n] sums over the texts of a look; those of many are normal."""
    if requests <= MANY:
        return ratio_sums(*texts(rng, loss, tail, (streams, requests)))
    mean, covariance = moments(loss, tail)
    sums = rng.multivariate_normal(requests * mean, requests * covariance, streams).T
    return Ratio(np.full(streams, float(requests)), *sums)


def draw(rng: np.random.Generator, truth: Truth, streams: int, requests: int) -> Windows:
    """[n] sums of one arm over one look."""
    none = np.zeros(streams)
    loss = loss_sums(rng, LOSS + truth.loss, truth.tail, streams, requests)
    errors = rng.binomial(requests, ERRORS + truth.errors, streams).astype(float)
    latency = rng.multinomial(requests, bins_of(truth.latency), streams).astype(float)
    return Windows(none + requests, errors, none, none, loss, latency)


def stacked(looks: list[Windows]) -> Windows:
    """[n, W] what was seen since each look."""

    def since(columns: list[Array]) -> Array:
        return np.stack(columns, axis=1)[:, ::-1].cumsum(1)[:, ::-1]

    plain = ("requests", "errors", "rewards", "reward", "latency")
    columns = {name: since([getattr(look, name) for look in looks]) for name in plain}
    return Windows(loss=Ratio(*(since([look.loss[i] for look in looks]) for i in range(6))), **columns)


def variance_of(name: MeasureName, arm: Windows) -> Array:
    """[n, W] about the variance of a measure of an arm."""
    if name == "loss":
        ratio = arm.loss.x / arm.loss.y
        return (arm.loss.xx - 2 * ratio * arm.loss.xy + ratio**2 * arm.loss.yy) / arm.loss.y**2
    if name == "errors":
        return np.maximum(arm.errors / arm.requests, ERRORS) / arm.requests
    q = level_of(name)  # of a latency by that of the fallback: of the logarithm, by the normal density there
    return q * (1 - q) * 2 * np.pi * np.exp(ndtri(q) ** 2) * SPREAD**2 / arm.requests


def decisions(number: int, release: Windows, fallback: Windows) -> tuple[Flags, Flags]:
    """[n] whether each stream is promoted, and whether it is rolled back."""
    arms = release, fallback
    back, holds = [], release.requests[:, 0] >= LEAST
    margins = {name: SURE * np.sqrt(sum(variance_of(name, arm) for arm in arms)) for name in LIMITS}
    for name, limit in LIMITS.items():
        back.append((least_worse(PLAN, number, name, *arms, margins[name]) > limit).any(1))
        worse = worse_of(name, *(points_of(name, arm) for arm in arms))
        holds &= (worse + margins[name] <= limit)[:, 0]
    for name, limit in LIMITS.items():
        if holds.any():
            some = [arm.at(holds) for arm in arms]
            holds[holds] = whole_stage(PLAN, number, name, *some).high[:, 0] <= limit
    goes_back = np.any(back, axis=0)
    return holds & ~goes_back, goes_back


def plain_test(release: Windows, fallback: Windows) -> Flags:
    """[n] "the loss is not worse than allowed", by a normal test at alpha of all so far."""
    worse = points_of("loss", release) - points_of("loss", fallback)
    error = np.sqrt(variance_of("loss", release) + variance_of("loss", fallback))
    return (worse - ndtri(PLAN.alpha) * error <= LIMITS["loss"])[:, 0]


def simulate(truth: Truth, streams: int, hourly: int = HOURLY, looks: int = LOOKS) -> Ends:
    rng = np.random.default_rng([SEED, *map(ord, truth.name)])
    parts = [
        _simulate(rng, truth, min(CHUNK, streams - start), hourly, looks)
        for start in range(0, streams, CHUNK)
    ]
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Ends(*(np.concatenate(column) for column in columns))


def _simulate(rng: np.random.Generator, truth: Truth, streams: int, hourly: int, looks: int) -> Ends:
    ends = Ends(*(np.zeros(streams) for _ in range(6)))
    going = np.arange(streams)
    for number, stage in enumerate(PLAN.stages, start=1):
        inside = np.arange(len(going))  # of the streams that reached this stage, those not yet decided
        next_stage: list[NDArray[np.intp]] = []
        seen: tuple[list[Windows], list[Windows]] = ([], [])
        requests = round(hourly * stage.share)
        for look in range(1, looks + 1):
            now = truth.at(number, look)
            quiet = replace(now, loss=0.0, errors=0.0, latency=0.0)
            for arm, worse, n in zip(seen, (now, quiet), (requests, hourly - requests), strict=True):
                arm.append(draw(rng, worse, len(inside), n))
            at = going[inside]
            ends.hours[at] += 1
            ends.answered[at] += requests
            ends.faulty[at] += truth.at(number, look) is truth
            release, fallback = (stacked(arm) for arm in seen)
            promoted, back = decisions(number, release, fallback)
            if now.is_bad:
                ends.naive[at] = np.maximum(ends.naive[at], plain_test(release, fallback))
            ends.back[at[back]] = 1
            ends.promoted[at[promoted]] += 1
            next_stage.append(at[promoted])
            left = ~(promoted | back)
            inside = inside[left]
            seen = ([one.at(left) for one in seen[0]], [one.at(left) for one in seen[1]])
            if not len(inside):
                break
        going = np.concatenate(next_stage)
        if not len(going):
            break
    return ends


def error_row(truth: Truth, ends: Ends) -> dict[str, object]:
    """Rates of what must not happen; empty where it would be right."""
    done = ends.promoted == len(PLAN.stages)
    hours = ends.hours[done]
    return {
        "truth": truth.name,
        "false promotion": float((ends.promoted >= truth.stage).mean()) if truth.is_bad else None,
        "loss, plain test at each look": float(ends.naive.mean()) if truth.is_bad and truth.loss else None,
        "false roll back": float(ends.back.mean()) if truth.is_allowed else None,
        "promoted to the end": float(done.mean()),
        "hours to the end, median": f"{np.median(hours):g}" if len(hours) else None,
    }


def fault_row(truth: Truth, ends: Ends) -> dict[str, object]:
    """How soon it was rolled back, from when the fault began; a median over those that reached it."""
    reached = ends.faulty > 0
    hours = np.where(ends.back > 0, ends.faulty, np.inf)[reached]
    middle, late = np.quantile(hours, [0.5, 0.9], method="higher")
    return {
        "fault": truth.name,
        "reached": float(reached.mean()),
        "rolled back": float((ends.back[reached] > 0).mean()),
        "promoted to the end": float((ends.promoted == len(PLAN.stages)).mean()),
        "hours, median": f"{middle:g}",
        "hours, 90 %": f"{late:g}",
        "requests that the release answered in all, median": f"{np.median(ends.answered[reached]):,.0f}",
    }


def show(console: Console, rows: list[dict[str, object]], title: str) -> None:
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: object) -> str:
    return "" if value is None else f"{100 * value:.2f} %" if isinstance(value, float) else str(value)


@entry
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--streams", type=count, default=2000, help="of each row")
    add_json(parser)
    args = parser.parse_args()
    console = Console(width=150, highlight=False)
    errors = []
    for truth in ERRING:
        errors.append(error_row(truth, simulate(truth, args.streams)))
        print(*errors[-1].values(), sep="; ", file=sys.stderr, flush=True)
    show(console, errors, f"{args.streams:,} streams a row; nominal {PLAN.alpha:.0%}")
    some = max(args.streams // 4, 1)  # times of hours need fewer
    faults = [fault_row(truth, simulate(truth, some)) for truth in FAULTS]
    show(console, faults, f"{HOURLY:,} requests and a look an hour; {some:,} streams a row")
    write_json(args.json, {"errors": errors, "faults": faults})


if __name__ == "__main__":
    main()
