"""What to recommend on a target: Holm over what could be shipped, then the best of those that are as fast.

And what can be told between any two variants.
"""

import math
from itertools import combinations
from typing import Any

from eval.core.checks import STUDENT
from eval.core.gate_file import Comparison, Relative, Variant
from eval.core.records import PLAIN, VALIDATION
from eval.core.sections.classification import latency_of
from eval.cost.estimates import estimate_ratio
from eval.gate.evidence import Contrast, Evidence
from eval.gate.quality import estimate
from eval.stats.crossed import PASS
from eval.stats.multiplicity import holm

PAIRED = 12  # recipes of which each is compared with each; the rest with `plain` alone


def compare_variants(evidence: Evidence, alpha: float) -> list[Comparison]:
    """Pairs of variants: they share seeds, documents and rounds, so that most of the noise cancels."""
    pairs = [(one, other) for other, one in combinations(evidence.recipes[:PAIRED], 2)]
    pairs += [(one, PLAIN) for one in evidence.recipes[PAIRED:]]
    targets, latency = dict.fromkeys(target for target, _ in evidence.costs), latency_of(evidence.study.task)
    comparisons = []
    for one, other in pairs:
        lead = estimate(evidence.gain(VALIDATION, Contrast(STUDENT, STUDENT, one, other)), alpha)
        shares = {
            target: estimate_ratio(evidence.costs[target, one], evidence.costs[target, other], latency, alpha)
            for target in targets
            if {(target, one), (target, other)} <= evidence.costs.keys()
        }
        decode = {
            target: Relative(point=share.point, lower=share.low, upper=share.high, of=other)
            for target, share in shares.items()
            if share is not None
        }
        comparisons.append(Comparison(recipe=one, over=other, lead=lead, decode=decode))
    return comparisons


def is_affordable(row: Variant) -> bool:
    """Every limit of the target is met: this is decided without a look at the quality."""
    return all(part.verdict == PASS for part in row.parts if part.name.startswith("cost"))


def add_holm(rows: list[Variant], alpha: float) -> list[Variant]:
    """Adds Holm's adjusted p-values over the shippable variants of one target.

    Serial gatekeeping (Dmitrienko and Tamhane 2007): what is shared by all variants, the teacher's gain, is
    tested once at alpha, and is no part of `p`; where it passes, Holm goes over the variants' own parts.
    """
    candidates = [i for i, row in enumerate(rows) if is_affordable(row)]
    adjusted = dict(zip(candidates, holm([rows[i].p for i in candidates]), strict=True))
    adjusted_rows = []
    for i, row in enumerate(rows):
        p = adjusted.get(i)
        update: dict[str, Any] = {"holm_p": p}
        if row.verdict == PASS and p is not None and p > alpha:
            update["reason"] = f"{row.reason}; alone, not as a pick of {len(candidates)} (Holm p = {p:.3f})"
        adjusted_rows.append(row.model_copy(update=update))
    return adjusted_rows


def is_shippable(row: Variant, alpha: float) -> bool:
    """Passes, and still does after the correction for having several variants to pick from."""
    return row.verdict == PASS and row.holm_p is not None and row.holm_p <= alpha


def _cost(row: Variant, name: str) -> float:
    value = row.cost[name].value if row.cost else None
    return math.inf if value is None else value


def _is_as_fast(evidence: Evidence, row: Variant, fastest: Variant, alpha: float) -> bool:
    """Can noise alone explain that it is slower? What was not measured in the same rounds is not compared."""
    if row is fastest:
        return True
    ours, theirs = (evidence.costs[one.target, one.recipe] for one in (row, fastest))
    share = estimate_ratio(ours, theirs, latency_of(evidence.study.task), alpha)
    return share is not None and share.low <= 1


def rank_variants(evidence: Evidence, rows: list[Variant], alpha: float) -> list[Variant]:
    """What is recommended, then what is as good: all that ship and are as fast as the fastest.

    Of these the one with the largest share of the gain comes first, then the smallest.
    """
    shippable = [row for row in rows if is_shippable(row, alpha)]
    if not shippable:
        return []
    latency = latency_of(evidence.study.task)
    fastest = min(shippable, key=lambda row: (_cost(row, latency), _cost(row, "disk"), row.recipe))
    alike = [row for row in shippable if _is_as_fast(evidence, row, fastest, alpha)]
    return sorted(alike, key=lambda row: (-(row.kept_share.point or 0.0), _cost(row, "disk"), row.recipe))
