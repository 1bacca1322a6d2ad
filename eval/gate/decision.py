"""From evidence to verdicts: each recipe on each target, what to ship there, and the study as a whole."""

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from eval.core.artifacts import digest
from eval.core.budget import Budget, Target
from eval.core.gate_file import GateFile, Hashes, KeptShare, Number, Part, Provenance, Variant
from eval.core.recipes import prefixes
from eval.core.records import PLAIN, VALIDATION
from eval.gate.caveats import list_caveats, other_budget
from eval.gate.evidence import CONTROL, STUDENT, Evidence
from eval.gate.limits import (
    commands_to_measure,
    cost_parts,
    is_cost_expected,
    measured_load,
    ratio,
    variant_costs,
)
from eval.gate.openings import summarize_openings
from eval.gate.quality import (
    GAIN,
    Shares,
    bootstrap_shares,
    estimate,
    gain_over_base,
    judge_slices,
    kept_gain,
    quality_parts,
    retention_power,
    share_chain,
    student_shares,
)
from eval.gate.secondary import collect_qualities
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict, holm


@dataclass(frozen=True)
class Candidate:
    """One recipe before its verdict: its quality is the same on every target."""

    recipe: str
    parts: list[Part]
    fields: dict[str, Any]


def build_candidate(e: Evidence, budget: Budget, found: Shares, recipe: str, before: list[str]) -> Candidate:
    parts = quality_parts(e, budget, recipe)
    fields = {
        "recipe": recipe,
        "engine": e.engines[recipe],
        "p": max(part.p or 0.0 for part in parts),
        "kept_share": found.of(kept_gain(recipe), GAIN),
        "kept_of_student": found.of(kept_gain(recipe), kept_gain(PLAIN)),
        "guard_share": found.of(gain_over_base(recipe), gain_over_base(PLAIN)),
        "chain": share_chain(found, before, recipe),
        "slices": judge_slices(e, found, parts, recipe),
        "scores": {name: estimate(e.scores(name, STUDENT, recipe), tested=False) for name in e.columns},
    }
    return Candidate(recipe, parts, fields)


def join_verdicts(parts: list[Part]) -> Verdict:
    """An intersection-union test: all must pass; one that fails decides, unless the assay is blind.

    A method that makes its teacher worse fails: it was seen, and there is no gain to keep.
    """
    verdicts = [part.verdict for part in parts]
    blind = parts[0].verdict == INCONCLUSIVE
    if blind or (FAIL not in verdicts and INCONCLUSIVE in verdicts):
        return INCONCLUSIVE
    return FAIL if FAIL in verdicts else PASS


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


def collect_hashes(e: Evidence, recipe: str, target: str) -> Hashes:
    def of(arm: str) -> dict[str, str]:
        return {str(seed): e.artifacts[f"{arm}/s{seed}/{recipe}"] for seed in e.study.seeds}

    tops = tuple(f"records/{kind}/{recipe}/" for kind in ("score", f"cost/{target}", f"load/{target}"))
    models = {f"{arm}-s{seed}" for arm in e.arms for seed in e.study.seeds}  # others are of earlier settings
    records = {
        path: found
        for path, found in e.records.items()
        if path.startswith(tops) and PurePosixPath(path).stem in models
    }
    return Hashes(artifact=of(STUDENT), control=of(CONTROL), records=records)


def judge_variant(e: Evidence, budget: Budget, case: Candidate, target: str) -> Variant:
    """One row: the quality of a recipe with its cost on one target."""
    limits = budget.targets[target]
    cost = variant_costs(e, target, case.recipe, limits, budget.alpha)
    parts = [
        *case.parts,
        *(cost_parts(e, target, case.recipe, limits, cost) if cost else [unmeasured_part(target)]),
    ]
    verdict = join_verdicts(parts)
    return Variant(
        **case.fields,
        target=target,
        verdict=verdict,
        reason=explain_verdict(verdict, parts, budget, target),
        parts=parts,
        holm_p=None,
        cost=cost,
        load=measured_load(e, target, case.recipe, budget.alpha),
        measured=cost is not None,
        how=commands_to_measure(e, target, case.recipe, limits),
        hashes=collect_hashes(e, case.recipe, target),
        recommended=False,
    )


def unmeasured_part(target: str) -> Part:
    reason = f"its cost was not measured on {target}"
    return Part(
        name="cost",
        verdict=INCONCLUSIVE,
        estimate=None,
        low=None,
        high=None,
        limit=0.0,
        unit="",
        reason=reason,
    )


def is_affordable(row: Variant) -> bool:
    """Every limit of the target is met: this is decided without a look at the quality."""
    return all(part.verdict == PASS for part in row.parts if part.name.startswith("cost"))


def add_holm(rows: list[Variant], alpha: float) -> list[Variant]:
    """Adds Holm's adjusted p-values over the shippable variants of one target."""
    candidates = [i for i, row in enumerate(rows) if is_affordable(row)]
    adjusted = dict(zip(candidates, holm([rows[i].p for i in candidates]), strict=True))
    made = []
    for i, row in enumerate(rows):
        p = adjusted.get(i)
        update: dict[str, Any] = {"holm_p": p}
        if row.verdict == PASS and p is not None and p > alpha:
            update["reason"] = f"{row.reason}; alone, not as a pick of {len(candidates)} (Holm p = {p:.3f})"
        made.append(row.model_copy(update=update))
    return made


def is_shippable(row: Variant, alpha: float) -> bool:
    """Passes, and still does after the correction for having several variants to pick from."""
    return row.verdict == PASS and row.holm_p is not None and row.holm_p <= alpha


def is_slower_than_student(e: Evidence, row: Variant, alpha: float) -> bool:
    """Is it slower in decode than its parent, the uncompressed student, or can that not be told?"""
    student = e.costs.get((row.target, PLAIN), [])
    share = ratio(e.costs[row.target, row.recipe], student, "decode_p50", alpha)
    return share is None or share.point > 1


def pick_variant(e: Evidence, rows: list[Variant], alpha: float) -> Variant | None:
    """The fastest in decode of those that ship and are not slower than their own parent; ties by disk."""

    def order(row: Variant) -> tuple[float, float, str]:
        numbers: dict[str, Number] = row.cost or {}
        speed, disk = numbers["decode_p50"].value, numbers["disk"].value
        return speed if speed is not None else math.inf, disk if disk is not None else math.inf, row.recipe

    return min(
        (r for r in rows if is_shippable(r, alpha) and not is_slower_than_student(e, r, alpha)),
        key=order,
        default=None,
    )


def judge_target(e: Evidence, budget: Budget, cases: list[Candidate], target: str) -> list[Variant]:
    """Rows of one target, the recommended one marked."""
    limits = budget.targets[target]
    rows = [
        judge_variant(e, budget, c, target)
        for c in cases
        if (target, c.recipe) in e.costs or is_cost_expected(e, limits, c.recipe)
    ]
    rows = add_holm(rows, budget.alpha)
    best = pick_variant(e, rows, budget.alpha)
    return [row.model_copy(update={"recommended": row is best}) for row in rows]


def target_verdict(rows: list[Variant]) -> Verdict:
    if any(row.recommended for row in rows):
        return PASS
    return FAIL if rows and all(row.verdict == FAIL for row in rows) else INCONCLUSIVE


def study_verdict(
    rows: dict[str, list[Variant]], targets: dict[str, Target], alpha: float
) -> tuple[Verdict, str]:
    """PASS: something ships on every required target. FAIL: on one of them everything fails."""
    found = {name: target_verdict(rows[name]) for name, target in targets.items() if target.required}
    order: list[Verdict] = [FAIL, INCONCLUSIVE, PASS]
    verdict = min(found.values(), key=order.index)
    if verdict != PASS:
        name = next(name for name, got in found.items() if got == verdict)
        return verdict, target_sentence(verdict, name, rows[name], alpha)
    return PASS, "; ".join(target_sentence(PASS, name, rows[name], alpha) for name in found)


def share_sentence(share: KeptShare) -> str:
    if share.point is None:
        return "keeps the asked share of the method's gain"
    return f"keeps {share.point:.2f} of the method's gain (95 % interval {share.low:.2f} to {share.high:.2f})"


def closest_variant(rows: list[Variant], verdict: Verdict) -> Variant:
    """The row of this verdict with the fewest parts in its way; compressed ones first."""
    found = [row for row in rows if row.verdict == verdict]
    return min(found, key=lambda r: (sum(p.verdict != PASS for p in r.parts), r.recipe == PLAIN))


def target_sentence(verdict: Verdict, target: str, rows: list[Variant], alpha: float) -> str:
    """One sentence that a manager understands."""
    if verdict == PASS:
        best = next(row for row in rows if row.recommended)
        return f"on {target} ship {best.recipe}: it {share_sentence(best.kept_share)} and meets every limit"
    if rows and (blind := rows[0].parts[0]).verdict != PASS:
        harmful = blind.verdict == FAIL
        return (
            blind.reason if harmful else f"the study cannot see the gain that it should judge: {blind.reason}"
        )
    if verdict == FAIL:
        best = closest_variant(rows, FAIL)
        return f"on {target} every variant fails; {best.recipe}: {best.reason}"
    if found := [row.recipe for row in rows if is_shippable(row, alpha)]:
        return (
            f"on {target} nothing can be recommended: each that passes ({', '.join(found)}) is slower in "
            "decode than the uncompressed student, or was not measured in its rounds"
        )
    if passed := [row for row in rows if row.verdict == PASS]:
        best = min(passed, key=lambda row: row.p)
        return (
            f"on {target} {best.recipe} passes alone, but not after the correction for choosing among "
            f"several variants (Holm p = {best.holm_p:.3f}, asked {alpha:g})"
        )
    best = closest_variant(rows, INCONCLUSIVE)
    return f"on {target} no variant passes yet; {best.recipe}: {best.reason}"


def evaluate_gate(e: Evidence, budget: Budget) -> GateFile:
    """The whole of gate.json: the same evidence gives the same bytes."""
    found = bootstrap_shares(e)
    before = prefixes(e.study)
    cases = [build_candidate(e, budget, found, recipe, before.get(recipe, [])) for recipe in e.recipes]
    rows = {target: judge_target(e, budget, cases, target) for target in budget.targets}
    verdict, reason = study_verdict(rows, budget.targets, budget.alpha)
    gains = {name: estimate(e.gain(name, GAIN)) for name in e.columns}
    return GateFile(
        study=e.study.name,
        title=e.study.title,
        method=e.study.method.name,
        verdict=verdict,
        reason=reason,
        notes=[*other_budget(e.study, budget), *list_caveats(e)],
        recommended={name: next((r.recipe for r in rows[name] if r.recommended), None) for name in rows},
        budget=describe_budget(e, budget),
        seeds=e.study.seeds,
        documents={name: len(columns) for name, columns in e.columns.items()},
        teacher_gain=gains[VALIDATION],
        teacher_gain_slices={name: gain for name, gain in gains.items() if name != VALIDATION},
        scores={
            arm: {name: estimate(e.scores(name, arm), tested=False) for name in e.columns} for arm in e.arms
        },
        kept_by_student=student_shares(e, found),
        power=retention_power(e, budget),
        variants=[row for name in rows for row in rows[name]],
        quality=collect_qualities(e, next(iter(rows.values()))),
        test_set=summarize_openings(e.openings, e.artifacts, digest(budget.model_dump(mode="json"))),
        provenance=collect_provenance(e),
    )


def describe_budget(e: Evidence, budget: Budget) -> dict[str, Any]:
    """The budget as it was read, its hash, and whether it is the one that the study names."""
    value = budget.model_dump(mode="json")
    return {**value, "hash": digest(value), "asked_by_study": e.study.budget}


def collect_provenance(e: Evidence) -> Provenance:
    return Provenance(
        config=e.study.hash(),
        data=e.data,
        machines=e.machines,
        versions=e.versions,
        artifacts=e.artifacts,
        records=e.records,
    )
