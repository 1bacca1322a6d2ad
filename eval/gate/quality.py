"""The gate's quality parts: assay sensitivity, retention, guard and slices of one variant."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from eval.core.budget import Budget
from eval.core.checks import CE, CONTROL, FALLBACK, STUDENT, TEACHERS
from eval.core.gate_file import Estimate, KeptShare, Link, Part, Power, Rival, Students
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import Study
from eval.gate.evidence import Contrast, Evidence
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Mean, crossed_mean
from eval.stats.power import clusters_for, components, effect_for, power, sample_components, seeds_for
from eval.stats.ratios import fieller, pigeonhole

Array = NDArray[np.float64]

RESOLUTION = 1e-5  # bits/byte: float32 scores do not resolve a smaller teacher gain, rounding can make one
DRAWS, BOOTSTRAP_SEED = 4_000, 0  # a cross-check: most of the time of a large gate
PLANS, PLAN_LEVEL = 1000, 0.8  # draws of a pilot's variances, and the level of the interval shown
GAIN = Contrast(*TEACHERS)
GAIN_OVER_BASE = Contrast(TEACHERS[0], FALLBACK)
GAIN_OVER_CE = Contrast(STUDENT, CE)


# The arm CE by `ce_arm` of the study: what is simpler than a student with a teacher.
UNTAUGHT = {
    True: "plain training on the same rows",
    "on_policy": "training on its own texts without a teacher",
}


def untaught(study: Study) -> str:
    """What the arm CE is, and how it was trained where that is not as S1."""
    own = study.own_training_text(CE)
    return UNTAUGHT[study.ce_arm] + (f" ({own})" if own else "")


def kept_gain(recipe: str) -> Contrast:
    return Contrast(STUDENT, CONTROL, recipe, recipe)


def gain_over_base(recipe: str) -> Contrast:
    return Contrast(STUDENT, FALLBACK, recipe)


def estimate(z: Array, alpha: float, tested: bool = True) -> Estimate:
    """The mean with the interval that decides: each end is a one-sided bound at alpha."""
    mean = crossed_mean(z)
    low, high = mean.bounds(alpha)
    p = mean.p if tested and not mean.problem else None
    return Estimate(point=mean.point, low=low, high=high, p=p, by_seed=z.mean(axis=1).tolist())


def mean_part(name: str, z: Array, alpha: float, on_pass: str, on_fail: str, resolution: float = 0.0) -> Part:
    """A test of mean > `resolution`, in bits/byte; the texts say what a PASS and a FAIL show."""
    mean = crossed_mean(z)
    low, high = mean.bounds(alpha)
    verdict = mean.verdict(alpha, resolution)
    unsure = mean.problem or f"whether {on_pass} is open: its bounds are {low:+.4f} and {high:+.4f} bits/byte"
    return Part(
        name=name,
        verdict=verdict,
        estimate=mean.point,
        low=low,
        high=high,
        limit=resolution,
        unit="bits/byte",
        p=mean.p_at_most(resolution),
        p_fail=mean.p_above(-resolution),
        reason={PASS: on_pass, FAIL: on_fail, INCONCLUSIVE: unsure}[verdict],
        remedy=None if verdict == PASS else remedy(z, mean, alpha),
    )


def remedy(z: Array, mean: Mean, alpha: float) -> str:
    """What would make a test of mean > 0 pass: evidence where that may be enough, else a better model."""
    if mean.problem:
        return mean.problem.rpartition(": ")[2]
    if mean.point <= 0:
        return f"{-mean.point:.2g} bits/byte more than was seen, and the width of its bound on top"
    (s, c), parts = z.shape, components(z)
    needed = seeds_for(parts, mean.point, c, alpha), clusters_for(parts, mean.point, s, alpha)
    wanted = [
        f"{int(n)} {what}" for n, what in zip(needed, ("seeds", "clusters"), strict=True) if np.isfinite(n)
    ]
    if not wanted:
        return f"a larger effect than the {mean.point:.2g} bits/byte that was seen"
    now = f"now {s} seeds and {c} clusters of documents"
    return f"about {' or '.join(wanted)} if what was seen is true ({now})"


def assay_part(evidence: Evidence, name: str, alpha: float) -> Part:
    """Can this study see the teacher's gain at all? A method that harms is seen, too."""
    z = evidence.gain(name, GAIN)
    mean = crossed_mean(z)
    _, high = mean.bounds(alpha)
    harm = f"by {-mean.point:.2g} bits/byte, {-high:.2g} at least" if high is not None else ""
    on_pass = f"the method improves the teacher on {name}"
    on_fail = f"there is no gain to keep: the method makes its teacher worse on {name} ({harm})"
    title = "assay" if name == VALIDATION else f"assay:{name}"
    return mean_part(title, z, alpha, on_pass, on_fail, RESOLUTION)


def surplus(evidence: Evidence, recipe: str, name: str, f: float) -> Array:
    """[S, C] L = (S1v - S0v) - f (T1 - T0)."""
    return evidence.gain(name, kept_gain(recipe)) - f * evidence.gain(name, GAIN)


def retention_part(evidence: Evidence, recipe: str, name: str, f: float, alpha: float) -> Part:
    """The surplus over the asked share is linear, so no ratio can blow up."""
    what = f"{f:g} of the teacher's gain is kept on {name}"
    z = surplus(evidence, recipe, name, f)
    return mean_part("retention", z, alpha, f"at least {what}", f"less than {what}")


def guard_part(evidence: Evidence, recipe: str, budget: Budget, name: str = VALIDATION) -> Part:
    """The release still beats its fallback: (S1v - B) - g (S1 - B) > 0, or (S1v - B) - delta_min > 0."""
    student, variant = (evidence.gain(name, gain_over_base(r)) for r in (PLAIN, recipe))
    if budget.g is None:
        assert budget.delta_min is not None
        lead, what = variant - budget.delta_min, f"{budget.delta_min:g} bits/byte over the base"
    else:
        lead, what = variant - budget.g * student, f"{budget.g:g} of the student's gain over the base"
    on_pass, on_fail = f"at least {what} is kept", f"less than {what} is kept"
    return mean_part("guard", lead, budget.alpha, on_pass, on_fail)


def fallback_part(evidence: Evidence, recipe: str, alpha: float, name: str = VALIDATION) -> Part:
    """S1v - B: a share of nothing would satisfy the guard, so the gain itself must be there too."""
    lead = evidence.gain(name, gain_over_base(recipe))
    on_fail = "it is worse than the base that it would replace"
    return mean_part("fallback", lead, alpha, "it beats the base", on_fail)


def over_ce_part(evidence: Evidence, share: float, alpha: float) -> Part:
    """(S1 - CE) - share (T1 - T0): what is absorbed is worth more than training without a teacher.

    A CE arm that ended worse than the base shows nothing: whoever beats it beats its learning rate.
    """
    lead = evidence.gain(VALIDATION, GAIN_OVER_CE) - share * evidence.gain(VALIDATION, GAIN)
    what = f"the student beats {untaught(evidence.study)} by {share:g} of the teacher's gain"
    part = mean_part("over_ce", lead, alpha, what, f"{what}: it does not")
    if part.verdict != PASS or (harm := harm_of(evidence, CE)) is None:
        return part
    reason = f"{what}, but that ended worse than the base by {harm:.2g} bits/byte: it is no rival"
    cure = "a CE arm at its own best rate (ce_train)"
    return part.model_copy(update={"verdict": INCONCLUSIVE, "reason": reason, "remedy": cure})


def harm_of(evidence: Evidence, rival: str) -> float | None:
    """Bits/byte by which a rival ended worse than the base; None where it did not."""
    gain = float(evidence.gain(VALIDATION, Contrast(rival, FALLBACK)).mean())
    return -gain if gain < 0 else None


def rivals_of(evidence: Evidence) -> dict[str, str]:
    """Arm -> what is simpler than S1: CE, and what the study names."""
    names: dict[str, str] = {CE: untaught(evidence.study)} if (CE, PLAIN) in evidence.bits else {}
    return names | {str(arm): what for arm, what in evidence.study.rivals.items()}


def harms_of_rivals(evidence: Evidence, alpha: float) -> dict[str, dict[str, Estimate]]:
    """Rival -> slice -> bits/byte by which it ended worse than the base, where it did as far as was seen."""
    harms: dict[str, dict[str, Estimate]] = {}
    for arm in rivals_of(evidence):
        for name in evidence.columns:
            z = evidence.gain(name, Contrast(FALLBACK, arm))
            if z.mean() > 0:
                harms.setdefault(arm, {})[name] = estimate(z, alpha)
    return harms


def describe_harms(harms: dict[str, dict[str, Estimate]]) -> list[str]:
    """Rivals that are none on a shifted slice; of the validation documents another note tells."""
    notes = []
    for arm, by_slice in harms.items():
        worse = [f"{e.point:.2g} bits/byte on {name}" for name, e in by_slice.items() if name != VALIDATION]
        if worse:
            where = "there a lead over it is no lead over what could be shipped"
            notes.append(f"{arm} ended worse than the base by {' and '.join(worse)}: {where}")
    return notes


def compare_rivals(evidence: Evidence, alpha: float) -> list[Rival]:
    """How much better than the uncompressed student each simpler rival is."""
    rivals = []
    for arm, what in rivals_of(evidence).items():
        z = evidence.gain(VALIDATION, Contrast(arm, STUDENT))
        beats, spoiled = crossed_mean(z).verdict(alpha) == PASS, harm_of(evidence, arm) is not None
        rivals.append(Rival(arm=arm, what=what, lead=estimate(z, alpha), beats=beats, spoiled=spoiled))
    return rivals


def slice_parts(evidence: Evidence, recipe: str, name: str, f: float, alpha: float) -> list[Part]:
    """Assay and retention on a shifted slice: where no gain of the teacher is visible, none can be kept."""
    assay, retention = assay_part(evidence, name, alpha), retention_part(evidence, recipe, name, f, alpha)
    changes: dict[str, object] = {"name": f"retention:{name}"}
    if assay.verdict != PASS:
        reason = f"no teacher gain is visible on {name}: {assay.reason}"
        changes |= {"verdict": INCONCLUSIVE, "p_fail": None, "reason": reason, "remedy": None}
    return [assay, retention.model_copy(update=changes)]


def quality_parts(evidence: Evidence, budget: Budget, recipe: str) -> list[Part]:
    """Parts 1 to 4 of the gate. Without assay sensitivity nothing else can be judged.

    Where students learn on what they write, a control without a teacher counts like S0: a sampled advantage
    can teach without knowing anything.
    """
    alpha, over_ce = budget.alpha, budget.over_ce
    if over_ce is None and evidence.study.ce_arm == "on_policy":
        over_ce = budget.f
    return [
        assay_part(evidence, VALIDATION, alpha),
        *([] if over_ce is None else [over_ce_part(evidence, over_ce, alpha)]),
        retention_part(evidence, recipe, VALIDATION, budget.f, alpha),
        guard_part(evidence, recipe, budget),
        fallback_part(evidence, recipe, alpha),
        *(part for n, f in budget.slices.items() for part in slice_parts(evidence, recipe, n, f, alpha)),
    ]


@dataclass(frozen=True)
class Shares:
    """Intervals of ratios of contrasts, with their bootstrap on the validation documents, at 1 - 2 alpha."""

    evidence: Evidence
    alpha: float
    columns: dict[Contrast, int]
    means: Array  # [draws, contrasts]
    cache: dict[tuple[Contrast, Contrast, str], KeptShare] = field(default_factory=dict)

    def of(self, gain: Contrast, reference: Contrast, name: str = VALIDATION) -> KeptShare:
        """What `gain` is of `reference`; computed once: a link of one chain is a link of others."""
        if (gain, reference, name) not in self.cache:
            self.cache[gain, reference, name] = self._compute(gain, reference, name)
        return self.cache[gain, reference, name]

    def _compute(self, gain: Contrast, reference: Contrast, name: str) -> KeptShare:
        x, y = (self.evidence.gain(name, contrast) for contrast in (gain, reference))
        ratio = fieller(x, y, self.alpha)
        if ratio is None:
            return KeptShare()
        low, high = None, None
        if name == VALIDATION:
            draws = self.means[:, self.columns[gain]] / self.means[:, self.columns[reference]]
            low, high = (float(v) for v in np.quantile(draws, [self.alpha, 1 - self.alpha]))
        ends = {"low": ratio.low, "high": ratio.high, "bootstrap_low": low, "bootstrap_high": high}
        by_seed = (x.mean(axis=1) / y.mean(axis=1)).tolist() if (y.mean(axis=1) > 0).all() else []
        return KeptShare(point=ratio.point, **ends, by_seed=by_seed)


def bootstrap_shares(evidence: Evidence, alpha: float) -> Shares:
    """Draws one bootstrap for all contrasts, in bits: bytes cancel from a ratio of two sums."""
    contrasts = [GAIN, GAIN_OVER_BASE]
    contrasts += [c for r in evidence.recipes for c in (kept_gain(r), gain_over_base(r))]
    if (CE, PLAIN) in evidence.bits:
        contrasts.append(GAIN_OVER_CE)
    raw = np.stack([evidence.saved_bits(VALIDATION, contrast) for contrast in contrasts])
    columns = {contrast: i for i, contrast in enumerate(contrasts)}
    return Shares(evidence, alpha, columns, pigeonhole(raw, DRAWS, BOOTSTRAP_SEED))


def student_shares(evidence: Evidence, shares: Shares) -> Students:
    return Students(
        over_control=shares.of(kept_gain(PLAIN), GAIN),
        over_ce=shares.of(GAIN_OVER_CE, GAIN) if GAIN_OVER_CE in shares.columns else None,
        over_base=shares.of(gain_over_base(PLAIN), GAIN_OVER_BASE),
    )


def share_chain(shares: Shares, prefixes: list[str], recipe: str) -> list[Link]:
    """R = R_distil x R_compress: the student's share of the teacher's gain, then each step's of the rest.

    `prefixes` are the recipes of the study that this one continues, the shortest first.
    """
    links = [Link(step="distil", over="teacher", share=shares.of(kept_gain(PLAIN), GAIN))]
    steps = [PLAIN, *prefixes, recipe] if recipe != PLAIN else []
    return links + [
        Link(step=step, over=over, share=shares.of(kept_gain(step), kept_gain(over)))
        for over, step in pairwise(steps)
    ]


def retention_power(evidence: Evidence, budget: Budget, name: str = VALIDATION) -> Power | None:
    """Power to pass the retention test again, with the uncompressed student of this run as the pilot."""
    f, alpha = budget.f if name == VALIDATION else budget.slices[name], budget.alpha
    z = surplus(evidence, PLAIN, name, f)
    (s, c), mean = z.shape, crossed_mean(z)
    if mean.problem:
        return None
    parts, effect, gain = components(z), mean.point, float(evidence.gain(name, GAIN).mean())
    sampled = power(sample_components(z, PLANS, BOOTSTRAP_SEED), effect, s, c, alpha)
    low, high = np.quantile(sampled, [(1 - PLAN_LEVEL) / 2, (1 + PLAN_LEVEL) / 2])
    seeds, clusters = seeds_for(parts, effect, c, alpha), clusters_for(parts, effect, s, alpha)
    return Power(
        clusters=c,
        seeds=s,
        effect=effect,
        power_now=float(power(parts, effect, s, c, alpha)),
        power_low=float(low),
        power_high=float(high),
        seeds_for_80=int(seeds) if np.isfinite(seeds) else None,
        clusters_for_80=int(clusters) if np.isfinite(clusters) else None,
        share_for_80=f + float(effect_for(parts, s, c, alpha)) / gain if gain > 0 else None,
    )
