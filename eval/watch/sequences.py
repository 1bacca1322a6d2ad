"""What a history of looks says, by bounds that hold at every look: pure functions.

A look more costs nothing, and nobody needs to know beforehand when to stop. What is *kept* is shown by
everything so far; what is *lost* by everything since any one look, so that a change is found weeks after it
came. docs/statistics.md has the bounds and a simulated year of looks.
"""

from typing import Literal, NamedTuple

from eval.core.gate_file import Estimate
from eval.release.contract_file import Bits, Gain, Of, Saving, over_documents
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict, cluster_bounds
from eval.stats.drift import QUESTIONS, Moved
from eval.stats.sequential import mean_bounds, start_level
from eval.watch.history import Array, Series
from eval.watch.regression import HARDER, Finding

State = Literal["fine", "the method is fading", "the world got harder", "both", "the input changed"]
KEPT = 0.8  # of what was saved at the release: less is fading
PARTS = 4  # that share alpha: saved over the control, over the fallback, difficulty, the input


class Extreme(NamedTuple):
    """A bound since one of the looks."""

    bound: float
    day: str


def look_count(looks: int) -> str:
    return "1 look" if looks == 1 else f"{looks} looks"


def estimate_so_far(values: Array, alpha: float, tuned: float) -> Estimate:
    """A mean with a bound on either side, each at alpha over all times."""
    low, high = mean_bounds(values, alpha, tuned) or (None, None)
    return Estimate(point=float(values.mean()), low=low, high=high)


def change_so_far(before: Array, now: Array, alpha: float, tuned: float) -> Estimate:
    """Difference of means: what was measured once spends half of alpha, what is looked at again the other."""
    point = float(now.mean() - before.mean())
    once, always = cluster_bounds(before, alpha / 2), mean_bounds(now, alpha / 2, tuned)
    if once is None or always is None:
        return Estimate(point=point, low=None, high=None)
    return Estimate(point=point, low=always[0] - once[1], high=always[1] - once[0])


def lowest_since(series: Series, of: Of, alpha: float) -> Extreme | None:
    """The smallest upper bound of what the release saves since any look; alpha holds for all of them."""
    extremes = []
    for number, start in enumerate(series.starts, 1):
        part = series.since(start)
        if len(part.bytes) < 2:
            continue
        bounds = mean_bounds(part.over(of), start_level(alpha, number), series.tuned)
        if bounds is not None:
            extremes.append(Extreme(bounds[1], series.days[number - 1]))
    return min(extremes, default=None)


def hardest_since(series: Series, before: Bits, alpha: float) -> Extreme | None:
    """The largest lower bound of bits per byte by which it is harder for the fallback since any look."""
    once = cluster_bounds(before.level("fallback"), alpha / 2)
    if once is None:
        return None
    extremes = []
    for number, start in enumerate(series.starts, 1):
        part = series.since(start)
        if len(part.bytes) < 2:
            continue
        bounds = mean_bounds(part.level("fallback"), start_level(alpha / 2, number), series.tuned)
        if bounds is not None:
            extremes.append(Extreme(bounds[0] - once[1], series.days[number - 1]))
    return max(extremes, default=None)


def check_saving_so_far(
    of: Of, before: Bits, series: Series, floor: float | None, alpha: float, broken_alpha: float
) -> Finding:
    """What is saved, held against its floor at every look.

    Args:
        alpha: chance of ever saying that a floor holds which does not.
        broken_alpha: chance of ever saying that this floor is missed although it holds.
    """
    then, now, tuned = before.over(of), series.bits.over(of), series.tuned
    base = Finding(
        f"saved over the {of}",
        over_documents(then, alpha),
        estimate_so_far(now, alpha, tuned),
        change_so_far(then, now, alpha, tuned),
        floor,
    )
    if floor is None:
        return base
    lowest = lowest_since(series, of, broken_alpha)
    low, high = base.now.low, base.now.high
    verdict: Verdict = INCONCLUSIVE
    if lowest is not None and lowest.bound < floor:
        verdict = FAIL
        reason = f"at most {lowest.bound:.3f} since the look of {lowest.day}, promised {floor:.3f}"
    elif low is None or high is None:
        reason = f"{len(now)} independent documents, or groups, are too few to look at again and again"
    elif low >= floor:
        verdict, reason = PASS, f"at least {low:.3f}, promised {floor:.3f}"
    else:
        reason = f"between {low:.3f} and {high:.3f}, promised {floor:.3f}"
    return Finding(base.name, base.before, base.now, base.change, floor, verdict, reason)


def findings_so_far(gain: Gain, before: Bits, series: Series, alpha: float) -> list[Finding]:
    """As `regression.findings`, for everything that was seen so far, at any number of looks."""
    models: tuple[Of, ...] = ("release", "control", "fallback")
    levels = []
    for of in models:
        then, now = before.level(of), series.bits.level(of)
        change = change_so_far(then, now, alpha, series.tuned)
        levels.append(
            Finding(
                f"{of}, bits per byte",
                over_documents(then, alpha),
                estimate_so_far(now, alpha, series.tuned),
                change,
            )
        )
    savings: dict[Of, Saving] = {"control": gain.over_control, "fallback": gain.over_fallback}
    floors = sum(saving.floor is not None for saving in savings.values())
    return levels + [
        check_saving_so_far(of, before, series, saving.floor, alpha, alpha / max(floors, 1))
        for of, saving in savings.items()
    ]


class Blame(NamedTuple):
    """Who is to blame, since when, and by which figures."""

    state: State
    reasons: list[str]


def faded(of: Of, before: Bits, series: Series, alpha: float) -> str:
    """What to say where the release saves less than `KEPT` of what it did, since any look; else empty."""
    then, lowest = cluster_bounds(before.over(of), alpha / 2), lowest_since(series, of, alpha / 2)
    if then is None or lowest is None or then[0] <= 0 or lowest.bound >= KEPT * then[0]:
        return ""
    was = f"{before.over(of).mean():.3f} [{then[0]:.3f}, {then[1]:.3f}] when it was released"
    return f"saved over the {of}: at most {lowest.bound:.3f} bits per byte since {lowest.day}, {was}"


def blame(before: Bits, series: Series, drift: list[Moved], alpha: float) -> Blame:
    """Did the method lose what it is worth, did the texts become harder for everybody, or are they others?

    What the method is worth is what the release saves against its control and the fallback on the same texts;
    how hard they are is what the fallback says of them. Any alarm that should not ring has chance alpha, over
    all looks.

    Args:
        drift: of the input, at alpha / `PARTS`.
    """
    level = alpha / PARTS
    smaller = [line for of in ("control", "fallback") if (line := faded(of, before, series, level))]
    hardest = hardest_since(series, before, level)
    usual = float(before.level("fallback").mean())
    harder = []
    if hardest is not None and hardest.bound > HARDER * usual:
        rise = f"at least {hardest.bound:.3f} bits per byte more since {hardest.day}"
        harder = [f"the fallback needs {rise}, {usual:.3f} when it was released"]
    changed = [
        f"{QUESTIONS[one.name]}: median {one.now:.4g}, {one.before:.4g} when it was released, "
        f"Cliff's delta {one.effect:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
        for one in drift
        if one.since is not None
    ]
    if smaller or harder:
        state: State = (
            "both" if smaller and harder else "the method is fading" if smaller else "the world got harder"
        )
        return Blame(state, [*smaller, *harder, *changed])
    return Blame("the input changed", changed) if changed else Blame("fine", [])
