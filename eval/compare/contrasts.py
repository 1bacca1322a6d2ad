"""What several studies say of their methods, side by side, by the tables [S, C] of each."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eval.core.budget import Budget
from eval.core.checks import CE, STUDENT
from eval.core.config import Frozen, Stored
from eval.core.errors import UserError
from eval.core.gate_file import Estimate, Relative
from eval.core.records import PLAIN, VALIDATION
from eval.cost.estimates import estimate_ratio
from eval.gate.evidence import REFERENCES, Evidence
from eval.gate.quality import GAIN, GAIN_OVER_CE, RESOLUTION, estimate, harm_of, kept_gain
from eval.stats.crossed import PASS, crossed_mean, linearise
from eval.stats.multiplicity import holm
from eval.stats.ratios import fieller

Array = NDArray[np.float64]
S1 = (STUDENT, PLAIN)
SERVED = ("decode_p50", "peak_memory")  # of the teacher, as multiples of the plain student's
ABSORBED, NOT_SHOWN = "absorbed", "not shown absorbed"  # of a gain that is seen
NOT_SEEN, HARMS = "no gain is seen", "the method harms"


class Compared(Frozen):
    """One study. Figures are of the uncompressed student, on validation, with their bounds at alpha."""

    study: str
    config: str  # hash of its settings
    method: str
    gain: Estimate  # T1 - T0, bits/byte
    lead: Estimate  # S1 - S0, bits/byte
    share: tuple[float, float, float] | None  # of the gain; null where no gain is seen
    over_ce: Estimate | None  # S1 - CE, bits/byte; null without that arm
    ce_harm: float | None = None  # bits/byte by which CE ended worse than the base; null where it did not
    ce_otherwise: str  # what of CE's training is otherwise than S1's; empty where nothing is
    teacher: dict[str, Relative]  # quantity -> the teacher's, as a multiple of the student's
    seeds: int
    clusters: int
    p: float  # of "the student keeps nothing of a gain": the larger of those of gain and lead
    holm_p: float  # adjusted over the studies
    result: str
    behind: Estimate | None = None  # bits/byte by which the first one's lead is larger; null where not paired
    as_good: bool | None = None  # it keeps more than 1 - margin of the first one's lead
    over_first: Estimate | None = None  # bits/byte by which its S1 is better than the first one's
    over_first_p: float | None = None  # of "they are the same", of two sides, adjusted over such pairs


class ComparisonFile(Stored):
    """compare.json."""

    margin: float
    rows: list[Compared]
    notes: list[str]


def compare(studies: Sequence[tuple[Evidence, Budget]], margin: float) -> list[Compared]:
    """Every study beside the others, and beside the first one where documents and seeds are the same.

    Args:
        margin: share of the first study's lead that another one may be behind.

    Raises:
        UserError: the studies have another alpha.
    """
    whole, alpha = studies[0][0], studies[0][1].alpha
    for evidence, other in studies[1:]:
        if other.alpha != alpha:
            problem = f"alpha {other.alpha:g} in its budget, {alpha:g} in that of {whole.study.name}"
            raise UserError(f"study {evidence.study.name}", problem, "give studies with one alpha")
    rows = [_compared(evidence, alpha) for evidence, _ in studies]
    adjusted = holm([row.p for row in rows])
    result = []
    for row, p, (evidence, _) in zip(rows, adjusted, studies, strict=True):
        update = {"holm_p": p, "result": _result(row, p, alpha)}
        result.append(row.model_copy(update=update | _beside(evidence, whole, margin, alpha)))
    raw = {place: row.over_first_p for place, row in enumerate(result) if row.over_first_p is not None}
    for place, p in zip(raw, holm([*raw.values()]), strict=True):
        result[place] = result[place].model_copy(update={"over_first_p": p})
    return result


def _compared(evidence: Evidence, alpha: float) -> Compared:
    gain, lead = evidence.gain(VALIDATION, GAIN), evidence.gain(VALIDATION, kept_gain(PLAIN))
    seen = crossed_mean(gain).p_at_most(RESOLUTION)  # as the gate asks it
    share = fieller(lead, gain, alpha)
    over_ce = evidence.gain(VALIDATION, GAIN_OVER_CE) if CE in evidence.arms else None
    return Compared(
        study=evidence.study.name,
        config=evidence.study.hash(),
        method=evidence.study.method.name,
        gain=estimate(gain, alpha),
        lead=estimate(lead, alpha),
        share=None if share is None else tuple(share),
        over_ce=None if over_ce is None else estimate(over_ce, alpha),
        ce_harm=None if over_ce is None else harm_of(evidence, CE),
        ce_otherwise=evidence.study.own_training_text(CE) if over_ce is not None else "",
        teacher=_served(evidence, alpha),
        seeds=gain.shape[0],
        clusters=gain.shape[1],
        p=max(seen, crossed_mean(lead).p),
        holm_p=1.0,
        result="",
    )


def _served(evidence: Evidence, alpha: float) -> dict[str, Relative]:
    """The teacher's costs as multiples of the student's, on the first target where both were measured."""
    for (target, arm), records in evidence.references.items():
        student = evidence.costs.get((target, PLAIN), [])
        if arm == REFERENCES[0] and records and student:
            shares = {name: estimate_ratio(records, student, name, alpha) for name in SERVED}
            return {
                name: Relative(point=one.point, lower=one.low, upper=one.high, of=PLAIN)
                for name, one in shares.items()
                if one is not None
            }
    return {}


def _result(row: Compared, p: float, alpha: float) -> str:
    if p <= alpha:
        return ABSORBED
    low, high = row.gain.low, row.gain.high
    if low is None or high is None:
        return NOT_SEEN
    return HARMS if high < -RESOLUTION else NOT_SHOWN if low > RESOLUTION else NOT_SEEN


def _beside(evidence: Evidence, whole: Evidence, margin: float, alpha: float) -> dict[str, object]:
    """The lead, and S1 itself, beside those of the first study, on the same documents and seeds."""
    same = evidence.data == whole.data and evidence.study.seeds == whole.study.seeds
    if evidence is whole or not same:
        return {}
    first = whole.gain(VALIDATION, kept_gain(PLAIN))
    lead = evidence.gain(VALIDATION, kept_gain(PLAIN))
    clusters, (one, other) = whole.clusters[VALIDATION], (whole.bits[S1], evidence.bits[S1])
    over = linearise(clusters.sums(one - other), clusters.sums(whole.bytes))
    worse, better = crossed_mean(over).p_above(0.0), crossed_mean(over).p
    return {
        "over_first": estimate(over, alpha, tested=False),
        "over_first_p": 1.0 if worse is None else min(1.0, 2 * min(worse, better)),
        "behind": estimate(first - lead, alpha, tested=False),
        "as_good": crossed_mean(lead - (1 - margin) * first).verdict(alpha) == PASS,
    }


def smallest(rows: Sequence[Compared]) -> Compared | None:
    """The last study, given from the whole to its smallest part, that is absorbed and as good as the first.

    None where the first one is not absorbed.

    Each is tested at alpha in the order given, and the first that is not as good ends the search: then the
    chance that a worse one is named is at most alpha (tests in a fixed order, Maurer et al. 1995).
    """
    if rows[0].result != ABSORBED:
        return None
    named = rows[0]
    for row in rows[1:]:
        if not row.as_good or row.result != ABSORBED:
            break
        named = row
    return named
