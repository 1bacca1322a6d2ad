"""PROMOTE, HOLD or ROLL BACK: what the requests of a stage say, at every look at them.

A stage is promoted when every measure is shown to be no worse than the plan allows, at alpha: all must hold,
so none is corrected, and stages are tested in a fixed order, each only after the one before it, so that *any*
false promotion of the rollout has chance alpha at most (fixed sequence: Maurer, Hothorn and Lehmacher 1995;
Westfall and Krishen 2001). One measure that is shown to be worse is enough to go back: alpha is split over
measures and stages (Bonferroni), and over the looks since which it may have become worse (`start_level`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eval.core.config import Stored
from eval.stats.arms import (
    BINS,
    LEAST,
    Bounds,
    Ratio,
    Tuned,
    chance_bounds,
    difference,
    latency_bins,
    quantile,
    quantile_bounds,
    ratio_bounds,
    relative,
)
from eval.stats.sequential import start_level
from eval.watch.routing import ARMS, Arm, MeasureName, Plan, Request

Array = NDArray[np.float64]
Decision = Literal["PROMOTE", "HOLD", "ROLL BACK"]
PROMOTE: Final = "PROMOTE"
HOLD: Final = "HOLD"
ROLL_BACK: Final = "ROLL BACK"


class Sums(Stored):
    """All that is kept of the requests of one arm between two looks."""

    requests: int = 0
    errors: int = 0
    rewards: int = 0  # requests that have one
    reward: float = 0.0  # their sum
    texts: int = 0  # requests with `bits`
    bits: float = 0.0
    bytes: float = 0.0
    bits_bits: float = 0.0  # sums of squares and products
    bits_bytes: float = 0.0
    bytes_bytes: float = 0.0
    latency: dict[int, int] = Field(default_factory=dict)  # bin of `eval.stats.arms` -> requests


def sums_of(requests: Iterable[Request]) -> Sums:
    rows = list(requests)
    texts = np.array([(r.bits, r.bytes) for r in rows if r.bits is not None], float).reshape(-1, 2)
    bits, size = texts.T
    rewards = [r.reward for r in rows if r.reward is not None]
    bins, counts = np.unique(
        latency_bins([r.latency_ms for r in rows if r.latency_ms is not None]), return_counts=True
    )
    return Sums(
        requests=len(rows),
        errors=sum(r.error for r in rows),
        rewards=len(rewards),
        reward=sum(rewards),
        texts=len(texts),
        bits=float(bits.sum()),
        bytes=float(size.sum()),
        bits_bits=float(bits @ bits),
        bits_bytes=float(bits @ size),
        bytes_bytes=float(size @ size),
        latency=dict(zip(bins.tolist(), counts.tolist(), strict=True)),
    )


@dataclass(frozen=True)
class Windows:
    """Sums of one arm over windows of looks, [..., W] each: latencies in bins, [..., W, BINS]."""

    requests: Array
    errors: Array
    rewards: Array
    reward: Array
    loss: Ratio
    latency: Array = field(repr=False)

    def at(self, index: Any) -> "Windows":
        """Some of the windows."""
        bins = (*index, slice(None)) if isinstance(index, tuple) else index
        return Windows(
            self.requests[index],
            self.errors[index],
            self.rewards[index],
            self.reward[index],
            Ratio(*(column[index] for column in self.loss)),
            self.latency[bins],
        )


def windows_of(looks: Sequence[Sums]) -> Windows:
    """[W] everything since each look of a stage; the first window is the whole stage."""

    def since(name: str) -> Array:
        return np.cumsum([float(getattr(look, name)) for look in looks][::-1])[::-1]

    latency = np.zeros((len(looks), BINS))
    for row, look in zip(latency, looks, strict=True):
        for number, count in look.latency.items():
            row[number] = count
    columns = ("texts", "bits", "bytes", "bits_bits", "bits_bytes", "bytes_bytes")
    return Windows(
        since("requests"),
        since("errors"),
        since("rewards"),
        since("reward"),
        Ratio(*map(since, columns)),
        latency[::-1].cumsum(0)[::-1],
    )


def counts_of(name: str, arm: Windows) -> Array:
    """[..., W] values of a measure."""
    if name.startswith("latency"):
        return arm.latency.sum(-1)
    return {"loss": arm.loss.n, "errors": arm.requests, "reward": arm.rewards}[name]


def points_of(name: str, arm: Windows) -> Array:
    """[..., W] a measure; not a number where there is no value."""
    with np.errstate(invalid="ignore", divide="ignore"):
        if name == "loss":
            return arm.loss.x / arm.loss.y
        if name == "errors":
            return arm.errors / arm.requests
        if name == "reward":
            return arm.reward / arm.rewards
    return quantile(arm.latency, level_of(name))


def level_of(name: str) -> float:
    return int(name.removeprefix("latency_p")) / 100


def worse_of(name: str, release: Array, fallback: Array) -> Array:
    """By how much a measure of the release is worse."""
    if name.startswith("latency"):
        return release / fallback - 1
    return fallback - release if name == "reward" else release - fallback


def worse_bounds(name: str, release: Windows, fallback: Windows, alpha: Any, tuned: Tuned) -> Bounds:
    """[..., W] bounds of that, each at `alpha`: half of it for each arm."""
    arms, half = zip((release, fallback), tuned, strict=True), np.asarray(alpha) / 2
    if name == "loss":
        return difference(*(ratio_bounds(arm.loss, half, t) for arm, t in arms))
    if name == "errors":
        return difference(*(chance_bounds(arm.errors, arm.requests, half, t) for arm, t in arms))
    if name == "reward":  # of what is missing to 1
        return difference(*(chance_bounds(arm.rewards - arm.reward, arm.rewards, half, t) for arm, t in arms))
    return relative(*(quantile_bounds(arm.latency, level_of(name), half, t) for arm, t in arms))


def tuned_for(plan: Plan, number: int) -> Tuned:
    """The fallback has the share that the release has not."""
    share = plan.stage(number).share
    return Tuned(plan.requests, max(plan.requests * (1 - share) / share, float(LEAST)))


def least_worse(
    plan: Plan, number: int, name: MeasureName, release: Windows, fallback: Windows, margin: Any = 0.0
) -> Array:
    """[..., W] by how much a measure is worse at least since each look of a stage.

    Minus infinity where the figure itself is no worse than allowed, and by `margin` more: no bound says more.
    """
    level = plan.alpha / (len(plan.measures) * len(plan.stages))
    shape = release.requests.shape
    levels = np.broadcast_to([start_level(level, look) for look in range(1, shape[-1] + 1)], shape)
    worse = worse_of(name, points_of(name, release), points_of(name, fallback))
    open_ = worse > plan.measures[name].worse_by + margin
    lows = np.full(shape, -np.inf)
    if open_.any():
        parts = release.at(open_), fallback.at(open_)
        lows[open_] = worse_bounds(name, *parts, levels[open_], tuned_for(plan, number)).low
    return lows


def whole_stage(plan: Plan, number: int, name: str, release: Windows, fallback: Windows) -> Bounds:
    """[..., 1] bounds of a measure by everything in the stage so far, each at alpha."""
    first = (..., slice(0, 1))
    parts = release.at(first), fallback.at(first)
    return worse_bounds(name, *parts, plan.alpha, tuned_for(plan, number))


class Finding(Stored):
    """One measure at a look."""

    measure: str
    release: float | None  # so far in this stage; null where there is no value
    fallback: float | None
    values: tuple[int, int]  # of release and fallback
    worse: float | None  # by how much the release is worse
    low: float | None  # bounds of that which hold at every look
    high: float | None
    allowed: float
    broken_since: int | None = None  # look of this stage since which it is worse than allowed, beyond doubt
    at_least: float | None = None  # worse by at least so much since then

    @property
    def holds(self) -> bool:
        return self.high is not None and self.high <= self.allowed and min(self.values) >= LEAST


def finite(value: Any) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def findings(plan: Plan, number: int, looks: dict[Arm, list[Sums]]) -> list[Finding]:
    """Every measure of the plan, by all looks of a stage so far."""
    arms = [windows_of(looks[arm]) for arm in ARMS]
    results = []
    for name, measure in plan.measures.items():
        points = [points_of(name, arm)[0] for arm in arms]
        bounds = whole_stage(plan, number, name, *arms)
        lows = least_worse(plan, number, name, *arms)
        first = int(np.argmax(lows))
        broken = bool(lows[first] > measure.worse_by)
        results.append(
            Finding(
                measure=name,
                release=finite(points[0]),
                fallback=finite(points[1]),
                values=(int(counts_of(name, arms[0])[0]), int(counts_of(name, arms[1])[0])),
                worse=finite(worse_of(name, *points)),
                low=finite(bounds.low[0]),
                high=finite(bounds.high[0]),
                allowed=measure.worse_by,
                broken_since=first + 1 if broken else None,
                at_least=finite(lows[first]) if broken else None,
            )
        )
    return results


UNITS = {"loss": " bits per byte", "errors": " of the requests", "reward": " of 1"}


def signed_amount(name: str, value: float) -> str:
    """By how much a measure is worse, with its sign; of a latency the share of the fallback's, in percent."""
    return f"{100 * value:+.4g} %" if name.startswith("latency") else f"{value:+.4g}"


def amount(one: Finding, value: Any) -> str:
    """The same in a sentence, with its unit."""
    if one.measure.startswith("latency"):
        return f"{100 * value:.4g} %"
    return f"{value:.4g}{UNITS[one.measure]}"


def decide(results: list[Finding]) -> tuple[Decision, str]:
    """The decision, and why."""
    if broken := [one for one in results if one.broken_since is not None]:
        one = broken[0]
        since = "" if one.broken_since == 1 else f" since look {one.broken_since} of this stage"
        least, allowed = amount(one, one.at_least), amount(one, one.allowed)
        return ROLL_BACK, f"{one.measure} is worse by {least} at least{since}, allowed {allowed}"
    if missing := [one for one in results if one.high is None]:
        one = missing[0]
        return HOLD, f"{one.measure}: {one.values[0]} and {one.values[1]} values say nothing yet"
    if few := [one for one in results if min(one.values) < LEAST]:
        return HOLD, f"{few[0].measure}: {min(few[0].values)} values of an arm, {LEAST} are the fewest"
    if unsure := [one for one in results if not one.holds]:
        one = unsure[0]
        return (
            HOLD,
            f"{one.measure} may be worse by {amount(one, one.high)}, allowed {amount(one, one.allowed)}",
        )
    return PROMOTE, "; ".join(f"{one.measure} is worse by {amount(one, one.high)} at most" for one in results)
