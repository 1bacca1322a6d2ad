"""How the parts of a variant become one verdict: an intersection for PASS, a union with a level for FAIL."""

from eval.core.budget import Budget
from eval.core.gate_file import Part
from eval.core.records import VALIDATION
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict
from eval.stats.multiplicity import holm

SHARED = ("assay", "over_ce")  # parts that are about no variant: one hypothesis for all of them


def is_shared(part: Part) -> bool:
    """True of a part that says the same of every variant: it is tested once, whatever is picked."""
    return part.name.partition(":")[0] in SHARED


def hold_failures(parts: list[Part], alpha: float) -> list[Part]:
    """The parts, of which those FAIL that do after Holm's correction over all that could have.

    One failed part fails the variant, and many parts are many chances: with nine, each at its limit, 29 % of
    studies would fail one of them falsely. What was counted and not sampled is no test: no correction.
    """
    tested = [i for i, part in enumerate(parts) if part.p_fail is not None]
    adjusted = dict(zip(tested, holm([parts[i].p_fail or 0.0 for i in tested]), strict=True))
    held = list(parts)
    for i, p in adjusted.items():
        if parts[i].verdict == FAIL and p > alpha:
            corrected = f"by itself, but not after Holm's correction for {len(tested)} tests (p = {p:.3f})"
            reason = f"{parts[i].reason}; {corrected}"
            held[i] = parts[i].model_copy(update={"verdict": INCONCLUSIVE, "reason": reason})
    return held


def join_verdicts(parts: list[Part]) -> Verdict:
    """An intersection-union test: all must pass; one that fails decides, unless the assay is blind.

    A method that makes its teacher worse fails: it was seen, and there is no gain to keep.
    """
    verdicts = [part.verdict for part in parts]
    blind = parts[0].verdict == INCONCLUSIVE
    if blind or (FAIL not in verdicts and INCONCLUSIVE in verdicts):
        return INCONCLUSIVE
    return FAIL if FAIL in verdicts else PASS


def slice_verdict(parts: list[Part], name: str) -> Verdict | None:
    """Of the parts about a shifted slice together; None where the budget asks nothing of it."""
    verdicts = [part.verdict for part in parts if part.name in (f"assay:{name}", f"retention:{name}")]
    return next((word for word in (FAIL, INCONCLUSIVE, PASS) if word in verdicts), None)


def explain_verdict(verdict: Verdict, parts: list[Part], budget: Budget, target: str) -> str:
    """The first part that decided, in words."""
    if verdict == PASS:
        slices = ", ".join([VALIDATION, *budget.slices])
        return f"keeps the asked share of the gain on {slices} and meets every limit of {target}"
    if parts[0].verdict == FAIL:
        return parts[0].reason
    if parts[0].verdict == INCONCLUSIVE:
        return f"the study cannot see the gain that it should judge: {parts[0].reason}"
    return "; ".join(part.reason for part in parts if part.verdict == verdict)
