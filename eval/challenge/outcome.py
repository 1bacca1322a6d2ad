"""What a row says: the claim of the study, tested anew where one thing was changed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from eval.challenge.rows import DAMAGED, PLACEBO, RATES, SAME
from eval.core.budget import Budget
from eval.core.checks import CE, CONTROL, FALLBACK, STUDENT
from eval.core.config import Frozen, Stored, differences
from eval.core.gate_file import Estimate
from eval.core.plan import budget_of_run
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import Study
from eval.gate.evidence import Contrast, Evidence, collect_evidence
from eval.gate.quality import GAIN, RESOLUTION, estimate, harm_of, kept_gain, retention_power, surplus
from eval.stats.crossed import FAIL, PASS, crossed_mean, linearise
from eval.stats.multiplicity import holm
from eval.stats.ratios import fieller

Array = NDArray[np.float64]
SURVIVES: Final = "survives"
COLLAPSES: Final = "collapses"
OPEN: Final = "cannot be told"
WORST = 0.01  # share of the documents that are looked at as the worst


class Outcome(Frozen):
    """One row of the table. `p_fail` is of "the claim holds"; `verdict` is after Holm over all rows."""

    name: str
    what: str
    claim: str
    gain: Estimate  # T1 - T0, in bits per byte, with its bounds at alpha
    lead: Estimate  # of S1 over its rival: S0, or CE
    share: tuple[float, float, float] | None  # of the gain, with its bounds at alpha
    margin: Estimate  # of the claim: above 0 it holds
    p: float  # of "the claim does not hold"
    p_fail: float | None
    verdict: Literal["survives", "collapses", "cannot be told"]
    needs: str  # what would tell, where it cannot be told
    seeds: int
    clusters: int


class Dose(Frozen):
    """The validation documents with a share of them damaged; figures with their bounds at alpha."""

    kind: str
    strength: float  # share of what is damaged; 0: the documents as they are
    slice: str
    gain: Estimate  # T1 - T0, in bits per byte of the damaged text
    lead: Estimate  # S1 - S0
    share: tuple[float, float, float] | None
    p: float  # of "less than f of the gain is kept, or there is none"
    worst: float  # bits per byte that S1 saves over B in the cluster where it saves least: a description
    worst_control: float  # that S0 saves there


class ChallengeFile(Stored):
    """challenge.json."""

    study: str
    config: str  # hash of its settings
    verdict: str
    rows: list[Outcome]
    doses: list[Dose]  # by kind and strength; empty where no document was damaged
    ce_train: dict[
        str, Any
    ]  # of the study in which CE has the best rate that was tried; empty where it has it
    notes: list[str]


@dataclass(frozen=True)
class Claim:
    """A row before the rows are taken together: tables [S, C] in bits per byte."""

    name: str
    what: str
    text: str
    gain: Array
    lead: Array
    margin: Array
    share: bool = True  # of the gain: not where the rival is no control
    empty: bool = False  # the method is: what must not be seen is a gain
    needs: str = ""


def read_evidence(study: Study) -> tuple[Evidence, Budget]:
    budget = budget_of_run(study)
    return collect_evidence(study.folder, study, budget), budget


def claims_of(name: str, what: str, evidence: Evidence, budget: Budget) -> Iterator[Claim]:
    """The claim of a row on the validation documents, and of the study as it is on each of its slices.

    Of damaged documents none: see `eval.challenge.doses`.
    """
    if name == DAMAGED:
        return
    floors = {VALIDATION: budget.f} | (budget.slices if name == SAME else {})
    for slice_name, f in floors.items():
        if name == PLACEBO:
            gain, lead = (evidence.gain(slice_name, of) for of in (GAIN, kept_gain(PLAIN)))
            yield Claim(name, what, "no gain is credited", gain, lead, -lead, share=False, empty=True)
            continue
        power = retention_power(evidence, budget, slice_name)
        wanted = [] if power is None else [(power.seeds_for_80, "seeds"), (power.clusters_for_80, "clusters")]
        needs = " or ".join(f"{count} {unit}" for count, unit in wanted if count)
        inside = slice_name == VALIDATION
        yield replace(
            claim_on(evidence, slice_name, f),
            name=name if inside else f"{name}:{slice_name}",
            what=what if inside else f"{what}, slice {slice_name}",
            needs=needs,
        )


def claim_on(evidence: Evidence, slice_name: str, f: float) -> Claim:
    """The student keeps at least f of the teacher's gain on a slice."""
    gain, lead = (evidence.gain(slice_name, of) for of in (GAIN, kept_gain(PLAIN)))
    margin = surplus(evidence, PLAIN, slice_name, f)
    return Claim(slice_name, slice_name, f"at least {f:g} of the gain", gain, lead, margin)


def rival_claims(rows: dict[str, Evidence], budget: Budget) -> Iterator[Claim]:
    """The student as it is against its control, and plain training, each at the best of the rates tried.

    The best rate is picked on the very documents that are compared, for the rival alone: against the claim.
    """
    same, rated = rows[SAME], tried_rates(rows)
    if len(rated) < 2:
        return
    sizes = same.clusters[VALIDATION].sums(same.bytes)
    gain = same.gain(VALIDATION, GAIN)
    for arm, text in ((CONTROL, f"at least {budget.f:g} of the gain"), (CE, "better than it")):
        if arm not in same.arms:
            continue
        best = best_rate(rated, arm)
        saved = same.clusters[VALIDATION].sums(rated[best].bits[arm, PLAIN] - same.bits[STUDENT, PLAIN])
        lead = linearise(saved, sizes)
        rate = "its own" if best == SAME else f"x {RATES[best]:g}"
        margin = lead - budget.f * gain if arm == CONTROL else lead
        harm = ", worse than the base" if arm == CE and harm_of(rated[best], CE) is not None else ""
        what = f"{arm} at its best learning rate ({rate}){harm}"
        yield Claim(f"best_{arm}", what, text, gain, lead, margin, share=arm == CONTROL)


def tried_rates(rows: dict[str, Evidence]) -> dict[str, Evidence]:
    """The study as it is, and the rows with another learning rate."""
    return {name: rows[name] for name in (SAME, *RATES) if name in rows}


def best_rate(rated: dict[str, Evidence], arm: str) -> str:
    """The row in which an arm has the fewest bits on the validation documents."""
    columns = rated[SAME].columns[VALIDATION]
    return min(rated, key=lambda name: float(rated[name].bits[arm, PLAIN][:, columns].sum()))


def best_ce_train(rows: dict[str, Evidence]) -> dict[str, Any]:
    """`ce_train` of the study in which CE has the best rate that was tried; empty where it has it."""
    rated, study = tried_rates(rows), rows[SAME].study
    if len(rated) < 2 or CE not in rows[SAME].arms or (best := best_rate(rated, CE)) == SAME:
        return {}
    dumps = (one.model_dump(mode="json") for one in (rated[best].study.training(CE), study.train))
    return differences(*dumps)


def judge_claims(claims: list[Claim], alpha: float) -> list[Outcome]:
    """Every claim at level `alpha`; one that collapses does so after Holm over all of them.

    That all survive is an intersection of tests, each at `alpha`; that any collapses is a union.
    """
    tests = [_test(claim, alpha) for claim in claims]
    fails = [1.0 if p_fail is None else p_fail for _, p_fail in tests]
    outcomes = []
    for claim, (p, p_fail), adjusted in zip(claims, tests, holm(fails), strict=True):
        verdict = SURVIVES if p <= alpha else COLLAPSES if adjusted <= alpha else OPEN
        share = fieller(claim.lead, claim.gain, alpha) if claim.share else None
        outcomes.append(
            Outcome(
                name=claim.name,
                what=claim.what,
                claim=claim.text,
                gain=estimate(claim.gain, alpha),
                lead=estimate(claim.lead, alpha),
                share=None if share is None else tuple(share),
                margin=estimate(claim.margin, alpha),
                p=p,
                p_fail=p_fail,
                verdict=verdict,
                needs=claim.needs if verdict == OPEN else "",
                seeds=claim.gain.shape[0],
                clusters=claim.gain.shape[1],
            )
        )
    return outcomes


def _test(claim: Claim, alpha: float) -> tuple[float, float | None]:
    """p of "the claim does not hold", and p of "it holds".

    A claim on a share of the gain needs the gain too. Of a method that is empty nothing may be credited
    beyond doubt: then p is 0, and else 1.
    """
    margin, gain = crossed_mean(claim.margin), crossed_mean(claim.gain)
    if claim.empty:
        lead = crossed_mean(claim.lead)
        credited = lead.verdict(alpha, RESOLUTION) == PASS
        return float(credited), lead.p_at_most(RESOLUTION) if credited else None
    harmful = gain.verdict(alpha, RESOLUTION) == FAIL
    fail = gain.p_above(-RESOLUTION) if harmful else margin.p_above(0.0)
    return max(margin.p, gain.p) if claim.share else margin.p, fail


def conclude(outcomes: list[Outcome]) -> str:
    """One sentence: what the idea does not survive, or what keeps one from telling; the worst row first."""
    fallen = sorted((one for one in outcomes if one.verdict == COLLAPSES), key=lambda one: one.p_fail or 0.0)
    if fallen:
        return f"collapses: {'; '.join(one.what for one in fallen)}"
    unsure = sorted((one for one in outcomes if one.verdict == OPEN), key=lambda one: -one.p)
    if unsure:
        worst = unsure[0]
        needs = f" (it would take {worst.needs})" if worst.needs else ""
        others = f"; also open: {'; '.join(one.what for one in unsure[1:])}" if unsure[1:] else ""
        return f"cannot be told: {worst.what}{needs}{others}"
    worst = max(outcomes, key=lambda one: one.p)
    return f"survives; weakest: {worst.what} (p = {worst.p:.2g})"


def rare_failures(evidence: Evidence) -> list[str]:
    """The documents and the cluster on which the student lost most against the base, and the control there.

    Descriptions, not tests: the worst were picked by the very scores that are shown.
    """
    columns = evidence.columns[VALIDATION]
    size = evidence.bytes[columns]
    by_arm = {
        arm: ((evidence.bits[FALLBACK, PLAIN] - evidence.bits[arm, PLAIN])[:, columns]).mean(0)
        for arm in (STUDENT, CONTROL)
    }
    worst = np.argsort(by_arm[STUDENT] / size)[: max(1, round(WORST * len(size)))]
    clusters = evidence.clusters[VALIDATION]
    sizes = clusters.sums(evidence.bytes)
    leads = {
        arm: evidence.saved_bits(VALIDATION, Contrast(arm, FALLBACK)).mean(0) / sizes
        for arm in (STUDENT, CONTROL)
    }
    group = int(np.argmin(leads[STUDENT]))
    texts = {arm: f"{float(bits[worst].sum() / size[worst].sum()):+.3f}" for arm, bits in by_arm.items()}
    return [
        f"over the base, bits/byte: on the worst {len(worst)} of {len(size)} documents S1 {texts[STUDENT]}, "
        f"S0 {texts[CONTROL]} there",
        f"over the base, bits/byte: in the worst of {len(sizes)} clusters S1 {leads[STUDENT][group]:+.3f}, "
        f"S0 {leads[CONTROL][group]:+.3f} there",
    ]
