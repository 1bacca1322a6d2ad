"""The gate's quality parts: assay sensitivity, retention, guard and slices of one variant."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eval.budget import Budget
from eval.evidence import CE, CONTROL, FALLBACK, STUDENT, TEACHERS, Contrast, Evidence
from eval.power import components, documents_for, power, seeds_for
from eval.records import HELDOUT, PLAIN
from eval.statistics import FAIL, INCONCLUSIVE, PASS, Mean, crossed_mean, fieller, pigeonhole
from eval.verdict import Estimate, Kept, Part, Power, Slice, Students

Array = NDArray[np.float64]

LEVEL = 0.95  # of reported intervals; tests use the budget's alpha
RESOLUTION = 1e-5  # bits/byte: float32 scores do not resolve a smaller teacher gain, rounding can make one
DRAWS, BOOTSTRAP_SEED = 2000, 0
GAIN = Contrast(*TEACHERS)
GAIN_OVER_BASE = Contrast(TEACHERS[0], FALLBACK)
OVER_CE = Contrast(STUDENT, CE)


def kept(recipe: str) -> Contrast:
    return Contrast(STUDENT, CONTROL, recipe, recipe)


def over_fallback(recipe: str) -> Contrast:
    return Contrast(STUDENT, FALLBACK, recipe)


def estimate(z: Array, tested: bool = True) -> Estimate:
    mean = crossed_mean(z)
    low, high = mean.bounds((1 - LEVEL) / 2)
    return Estimate(point=mean.point, low=low, high=high, p=mean.p if tested and not mean.problem else None)


def _part(name: str, mean: Mean, alpha: float, words: tuple[str, str], resolution: float = 0.0) -> Part:
    """A test of mean > 0; `words` say what a PASS shows and what a FAIL shows."""
    low, high = mean.bounds(alpha)
    verdict = mean.verdict(alpha, resolution)
    unsure = (
        mean.problem or f"it cannot be told whether {words[0]}: the bounds are {low:+.4f} and {high:+.4f}"
    )
    return Part(
        name=name,
        verdict=verdict,
        estimate=mean.point,
        low=low,
        high=high,
        limit=resolution,
        unit="bits/byte",
        p=mean.p,
        reason={PASS: words[0], FAIL: words[1], INCONCLUSIVE: unsure}[verdict],
    )


def assay(e: Evidence, name: str, alpha: float) -> Part:
    """Can this study see the teacher's gain at all?"""
    words = f"the method improves the teacher on {name}", f"the method makes the teacher worse on {name}"
    return _part("assay", crossed_mean(e.gain(name, GAIN)), alpha, words, RESOLUTION)


def retention(e: Evidence, recipe: str, name: str, f: float, alpha: float) -> Part:
    """L = (S1v - S0v) - f (T1 - T0): linear, so no ratio can blow up."""
    words = (
        f"at least {f:g} of the teacher's gain is kept on {name}",
        f"less than {f:g} of the teacher's gain is kept on {name}",
    )
    lost = e.gain(name, kept(recipe)) - f * e.gain(name, GAIN)
    return _part("retention", crossed_mean(lost), alpha, words)


def guard(e: Evidence, recipe: str, g: float, alpha: float) -> Part:
    """(S1v - B) - g (S1 - B): the release still beats what it would fall back to."""
    words = (
        f"at least {g:g} of the student's gain over the base is kept",
        f"less than {g:g} of the student's gain over the base is kept",
    )
    student, variant = (e.gain(HELDOUT, over_fallback(r)) for r in (PLAIN, recipe))
    return _part("guard", crossed_mean(variant - g * student), alpha, words)


def fallback(e: Evidence, recipe: str, alpha: float) -> Part:
    """S1v - B: a share of nothing would satisfy the guard, so the gain itself must be there too."""
    words = "it beats the base", "it is worse than the base that it would replace"
    return _part("fallback", crossed_mean(e.gain(HELDOUT, over_fallback(recipe))), alpha, words)


def on_slice(e: Evidence, recipe: str, name: str, f: float, alpha: float) -> Part:
    """Retention on a shifted slice; without a visible teacher gain there it cannot pass."""
    seen, part = assay(e, name, alpha), retention(e, recipe, name, f, alpha)
    changed: dict[str, object] = {"name": f"slice:{name}", "p": max(seen.p or 0.0, part.p or 0.0)}
    if seen.verdict != PASS:
        changed |= {"verdict": INCONCLUSIVE, "reason": f"no teacher gain is visible on {name}: {seen.reason}"}
    return part.model_copy(update=changed)


def quality_parts(e: Evidence, budget: Budget, recipe: str) -> list[Part]:
    """Parts 1 to 4 of the gate. Without assay sensitivity nothing else can be judged."""
    alpha = budget.alpha
    return [
        assay(e, HELDOUT, alpha),
        retention(e, recipe, HELDOUT, budget.f, alpha),
        guard(e, recipe, budget.g, alpha),
        fallback(e, recipe, alpha),
        *(on_slice(e, recipe, name, f, alpha) for name, f in budget.slices.items()),
    ]


@dataclass(frozen=True)
class Shares:
    """Fieller intervals of ratios of contrasts, with their bootstrap on the held-out documents."""

    evidence: Evidence
    columns: dict[Contrast, int]
    means: Array  # [draws, contrasts]

    def of(self, top: Contrast, below: Contrast, name: str = HELDOUT) -> Kept:
        found = fieller(self.evidence.gain(name, top), self.evidence.gain(name, below), LEVEL)
        if found is None:
            return Kept()
        low, high = None, None
        if name == HELDOUT:
            draws = self.means[:, self.columns[top]] / self.means[:, self.columns[below]]
            low, high = (float(v) for v in np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        return Kept(point=found.point, low=found.low, high=found.high, bootstrap_low=low, bootstrap_high=high)


def shares(e: Evidence) -> Shares:
    """Draws one bootstrap for all contrasts, in bits: bytes cancel from a ratio of two sums."""
    contrasts = [GAIN, GAIN_OVER_BASE]
    contrasts += [c for r in e.recipes for c in (kept(r), over_fallback(r))]
    if (CE, PLAIN) in e.bits:
        contrasts.append(OVER_CE)
    raw = np.stack([e.raw(HELDOUT, contrast) for contrast in contrasts])
    columns = {contrast: i for i, contrast in enumerate(contrasts)}
    return Shares(e, columns, pigeonhole(raw, DRAWS, BOOTSTRAP_SEED))


def students(e: Evidence, found: Shares) -> Students:
    return Students(
        over_control=found.of(kept(PLAIN), GAIN),
        over_ce=found.of(OVER_CE, GAIN) if OVER_CE in found.columns else None,
        over_base=found.of(over_fallback(PLAIN), GAIN_OVER_BASE),
    )


def slice_results(e: Evidence, found: Shares, parts: list[Part], recipe: str) -> dict[str, Slice]:
    verdicts = {part.name: part.verdict for part in parts}
    return {
        name: Slice(kept_share=found.of(kept(recipe), GAIN, name), verdict=verdicts.get(f"slice:{name}"))
        for name in e.columns
        if name != HELDOUT
    }


def planning(e: Evidence, budget: Budget) -> Power | None:
    """Power to pass the held-out retention again, with the uncompressed student of this run as the pilot."""
    z = e.gain(HELDOUT, kept(PLAIN)) - budget.f * e.gain(HELDOUT, GAIN)
    (s, c), mean = z.shape, crossed_mean(z)
    if mean.problem:
        return None
    parts, alpha = components(z), budget.alpha
    return Power(
        documents=c,
        seeds=s,
        effect=mean.point,
        power_now=power(parts, mean.point, s, c, alpha),
        seeds_for_80=seeds_for(parts, mean.point, c, alpha),
        documents_for_80=documents_for(parts, mean.point, s, alpha),
    )
