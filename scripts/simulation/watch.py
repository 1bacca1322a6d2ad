"""What `scripts.simulate_gate` simulates of a release in the world: a year of weekly looks."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import stdtrit

from eval.stats.sequential import half_widths, start_level
from scripts.simulation.parts import ALPHA, SEED, Array, Flags, Row, chunks

WEEKS, CHANGE = 52, 26
WAYS = ("each week alone", "all so far, t", "sequence", "since")
TUNED = 4  # weeks at which the sequences are narrowest


@dataclass(frozen=True)
class Looks:
    """Savings of the documents of a week against the floor, in standard errors of one week."""

    documents: int  # a week
    before: float  # what is saved above the floor before the change
    after: float
    skew: int = 0  # the long tail of a document's saving: 1 of gains, -1 of losses, 0 normal


FINE = [Looks(n, above, above, skew) for above in (1, 0) for n in (10, 40, 200) for skew in (0, 1, -1)]
BROKEN = [Looks(n, -2, -2, skew) for n in (10, 40, 200) for skew in (0, 1)]
CHANGED = [Looks(n, 1, -2) for n in (10, 40, 200)]


@cache
def sequence_widths(documents: int) -> tuple[Array, Array]:
    """[weeks] half widths of all so far, and [start, weeks] of those since each look, in deviations."""
    counts = documents * np.arange(1, WEEKS + 1)
    tuned = float(TUNED * documents)
    since = np.full((WEEKS, WEEKS), np.inf)
    for start in range(WEEKS):
        since[start, start:] = half_widths(counts[: WEEKS - start], start_level(ALPHA, start + 1), tuned)
    return half_widths(counts, ALPHA, tuned), since


def first_weeks(flags: Flags) -> Array:
    """[n] the week, from 1 on, of the first alarm in [n, weeks]; infinite where there is none."""
    return np.where(flags.any(-1), flags.argmax(-1) + 1.0, np.inf)


def below_floor(total: Array, squares: Array, count: Array, width: Array) -> Flags:
    """Is the upper bound of a mean below 0, of sums over `count` documents?"""
    mean = total / count
    deviation = np.sqrt(np.maximum(squares - count * mean**2, 0) / (count - 1))
    return mean + width * deviation < 0


def first_alarms(case: Looks, draws: int) -> dict[str, Array]:
    """The week in which each way of looking first calls the release broken."""
    rng = np.random.default_rng([SEED, case.documents, case.skew + 1, int(10 + case.after)])
    m = case.documents
    weeks_of: dict[str, list[Array]] = {name: [] for name in WAYS}
    weeks = np.arange(1.0, WEEKS + 1)
    level = np.where(weeks <= CHANGE, case.before, case.after) / np.sqrt(m)
    whole, since = sequence_widths(m)
    plain = -stdtrit(m - 1, ALPHA) / np.sqrt(m)
    growing = -stdtrit(m * weeks - 1, ALPHA) / np.sqrt(m * weeks)
    for n in chunks(draws):
        shape = (n, WEEKS, m)
        noise = case.skew * (rng.exponential(size=shape) - 1) if case.skew else rng.normal(size=shape)
        x = noise + level[:, None]
        total, squares = x.sum(-1), (x**2).sum(-1)
        sums, square_sums = total.cumsum(-1), squares.cumsum(-1)
        weeks_of["each week alone"].append(
            first_weeks(below_floor(total, squares, np.array(float(m)), plain))
        )
        for name, width in (("all so far, t", growing), ("sequence", whole)):
            weeks_of[name].append(first_weeks(below_floor(sums, square_sums, m * weeks, width)))
        alarms = np.zeros((n, WEEKS), bool)
        for start in range(WEEKS):
            before = (sums[:, start - 1 : start], square_sums[:, start - 1 : start]) if start else (0.0, 0.0)
            rest = sums[:, start:] - before[0], square_sums[:, start:] - before[1]
            alarms[:, start:] |= below_floor(*rest, m * weeks[: WEEKS - start], since[start, start:])
        weeks_of["since"].append(first_weeks(alarms))
    return {name: np.concatenate(parts) for name, parts in weeks_of.items()}


def named(case: Looks) -> str:
    tail = {0: "", 1: ", long tail of gains", -1: ", long tail of losses"}[case.skew]
    moved = "" if case.before == case.after else f", {case.after:+g} from week {CHANGE + 1} on"
    return f"{case.documents} documents a week, {case.before:+g} errors{moved}{tail}"


def look_rows(draws: int) -> list[Row]:
    """False alarms over a year, and the median of weeks until a broken release is found."""
    false = [
        {"scenario": named(case), "says": "called broken", **{k: float(np.isfinite(v).mean()) for k, v in
         first_alarms(case, draws).items()}}
        for case in FINE
    ]  # fmt: skip
    late: list[Row] = []
    for case in BROKEN + CHANGED:
        start = CHANGE if case.before != case.after else 0
        weeks = {name: float(np.median(first)) - start for name, first in first_alarms(case, draws).items()}
        late.append(
            {"scenario": named(case), "says": "median weeks", **{k: f"{w:g}" for k, w in weeks.items()}}
        )
    return [*false, *late]


@dataclass(frozen=True)
class Returning:
    """A year in which the same groups come every week, one document of each."""

    groups: int
    icc: float  # share of a document's variance that is its group's
    before: float  # saved above the floor, in standard errors of one week
    after: float

    @property
    def name(self) -> str:
        moved = "" if self.before == self.after else f", {self.after:+g} from week {CHANGE + 1} on"
        return f"{self.groups} groups every week, correlation {self.icc:g}, {self.before:+g} errors{moved}"


RETURNING = [
    Returning(groups, icc, before, after)
    for before, after in ((1, 1), (0, 0), (-2, -2), (1, -2))
    for groups in (20, 40, 100)
    for icc in (0.0, 0.2, 0.5)
]


def returning_alarms(case: Returning, draws: int) -> dict[str, Array]:
    """The week in which everything so far, and everything since any look, first calls the release broken.

    A group is one value: the mean of its documents of the weeks that count.
    """
    rng = np.random.default_rng([SEED, case.groups, int(100 * case.icc), int(10 + case.after)])
    level = np.where(np.arange(1, WEEKS + 1) <= CHANGE, case.before, case.after) / case.groups**0.5
    starts = np.arange(1, WEEKS + 1)
    width = half_widths(np.full(WEEKS, case.groups), ALPHA / (starts * (starts + 1)), TUNED * case.groups)
    alone = half_widths(case.groups, ALPHA, TUNED * case.groups)
    found: dict[str, list[Array]] = {"sequence": [], "since": []}
    for n in chunks(draws):
        own = case.icc**0.5 * rng.normal(size=(n, 1, case.groups))
        weeks = own + (1 - case.icc) ** 0.5 * rng.normal(size=(n, WEEKS, case.groups)) + level[:, None]
        sums = np.concatenate([np.zeros((n, 1, case.groups)), weeks.cumsum(1)], axis=1)
        whole, since = np.zeros((n, WEEKS), bool), np.zeros((n, WEEKS), bool)
        for week in range(1, WEEKS + 1):
            values = (sums[:, week : week + 1] - sums[:, :week]) / np.arange(week, 0, -1)[:, None]
            mean, deviation = values.mean(-1), values.std(-1, ddof=1)
            whole[:, week - 1] = mean[:, 0] + alone * deviation[:, 0] < 0
            since[:, week - 1] = (mean + width[:week] * deviation < 0).any(-1)
        found["sequence"].append(first_weeks(whole))
        found["since"].append(first_weeks(since))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def returning_rows(draws: int) -> list[Row]:
    """As `look_rows`, of groups that come back."""
    rows: list[Row] = []
    for case in RETURNING:
        first, false = returning_alarms(case, draws), case.after >= 0
        start = CHANGE if case.before != case.after else 0
        shown = {
            name: float(np.isfinite(weeks).mean()) if false else f"{float(np.median(weeks)) - start:g}"
            for name, weeks in first.items()
        }
        rows.append({"scenario": case.name, "says": "called broken" if false else "median weeks", **shown})
    return rows
