"""From evidence to verdicts: each recipe on each target, what to ship there, and the study as a whole."""

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from eval.core.artifacts import digest
from eval.core.budget import Budget, Target, load_budget
from eval.core.checks import CONTROL, STUDENT
from eval.core.gate_file import GateFile, Hashes, KeptShare, Number, Part, Provenance, Slice, Variant
from eval.core.records import PLAIN, VALIDATION
from eval.core.study import check_trained, load_study, prefixes
from eval.cost.estimates import estimate_ratio
from eval.gate.caveats import list_caveats
from eval.gate.evidence import Evidence, collect_evidence
from eval.gate.limits import (
    commands_to_measure,
    cost_parts,
    is_cost_expected,
    measured_load,
    variant_costs,
)
from eval.gate.openings import summarize_openings
from eval.gate.quality import (
    GAIN,
    Shares,
    bootstrap_shares,
    estimate,
    gain_over_base,
    kept_gain,
    quality_parts,
    retention_power,
    share_chain,
    student_shares,
)
from eval.gate.secondary import collect_qualities
from eval.gate.verdicts import explain_verdict, hold_failures, is_shared, join_verdicts, slice_verdict
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict
from eval.stats.multiplicity import holm


@dataclass(frozen=True)
class Candidate:
    """One recipe before its verdict: its quality is the same on every target."""

    recipe: str
    parts: list[Part]
    slice_shares: dict[str, KeptShare]  # by shifted slice
    fields: dict[str, Any]


def build_candidate(
    evidence: Evidence, budget: Budget, shares: Shares, recipe: str, prefixes: list[str]
) -> Candidate:
    parts = quality_parts(evidence, budget, recipe)
    zeros, low_bit = evidence.weights.get(recipe, (None, None))
    fields = {
        "recipe": recipe,
        "engine": evidence.engines[recipe],
        "p": max(part.p or 0.0 for part in parts if not is_shared(part)),
        "kept_share": shares.of(kept_gain(recipe), GAIN),
        "kept_of_student": shares.of(kept_gain(recipe), kept_gain(PLAIN)),
        "guard_share": shares.of(gain_over_base(recipe), gain_over_base(PLAIN)),
        "chain": share_chain(shares, prefixes, recipe),
        "zeros": zeros,
        "low_bit": low_bit,
        "scores": {
            name: estimate(evidence.scores(name, STUDENT, recipe), tested=False) for name in evidence.columns
        },
    }
    by_slice = {n: shares.of(kept_gain(recipe), GAIN, n) for n in evidence.columns if n != VALIDATION}
    return Candidate(recipe, parts, by_slice, fields)


def collect_hashes(evidence: Evidence, recipe: str, target: str) -> Hashes:
    seeds = evidence.study.seeds
    student, control = (
        {str(seed): evidence.artifacts[f"{arm}/s{seed}/{recipe}"] for seed in seeds}
        for arm in (STUDENT, CONTROL)
    )
    folders = tuple(f"records/{kind}/{recipe}/" for kind in ("score", f"cost/{target}", f"load/{target}"))
    models = {f"{arm}-s{seed}" for arm in evidence.arms for seed in seeds}  # others: of earlier settings
    records = {
        path: sha256
        for path, sha256 in evidence.records.items()
        if path.startswith(folders) and PurePosixPath(path).stem in models
    }
    return Hashes(artifact=student, control=control, records=records)


def judge_variant(evidence: Evidence, budget: Budget, candidate: Candidate, target: str) -> Variant:
    """One row: the quality of a recipe with its cost on one target."""
    limits = budget.targets[target]
    cost = variant_costs(evidence, target, candidate.recipe, limits, budget.alpha)
    on_cost = [unmeasured_part(target)]
    if cost:
        on_cost = cost_parts(evidence, target, candidate.recipe, limits, cost)
    parts = hold_failures([*candidate.parts, *on_cost], budget.alpha)
    slices = {
        name: Slice(kept_share=share, verdict=slice_verdict(parts, name))
        for name, share in candidate.slice_shares.items()
    }
    verdict = join_verdicts(parts)
    return Variant(
        **candidate.fields,
        target=target,
        verdict=verdict,
        reason=explain_verdict(verdict, parts, budget, target),
        parts=parts,
        slices=slices,
        holm_p=None,
        cost=cost,
        load=measured_load(evidence, target, candidate.recipe, budget.alpha),
        measured=cost is not None,
        how=commands_to_measure(evidence, target, candidate.recipe, limits),
        hashes=collect_hashes(evidence, candidate.recipe, target),
        recommended=False,
    )


def unmeasured_part(target: str) -> Part:
    return Part(
        name="cost",
        verdict=INCONCLUSIVE,
        estimate=None,
        low=None,
        high=None,
        limit=0.0,
        unit="",
        reason=f"its cost was not measured on {target}",
    )


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


def is_slower_than_student(evidence: Evidence, row: Variant, alpha: float) -> bool:
    """Is it slower in decode than its parent, the uncompressed student, or is that unknown?"""
    student = evidence.costs.get((row.target, PLAIN), [])
    share = estimate_ratio(evidence.costs[row.target, row.recipe], student, "decode_p50", alpha)
    return share is None or share.point > 1


def pick_variant(evidence: Evidence, rows: list[Variant], alpha: float) -> Variant | None:
    """The fastest in decode of those that ship and are not slower than their own parent; ties by disk."""

    def order(row: Variant) -> tuple[float, float, str]:
        numbers: dict[str, Number] = row.cost or {}
        speed, disk = numbers["decode_p50"].value, numbers["disk"].value
        return speed if speed is not None else math.inf, disk if disk is not None else math.inf, row.recipe

    return min(
        (r for r in rows if is_shippable(r, alpha) and not is_slower_than_student(evidence, r, alpha)),
        key=order,
        default=None,
    )


def judge_target(
    evidence: Evidence, budget: Budget, candidates: list[Candidate], target: str
) -> list[Variant]:
    """Rows of one target, the recommended one marked."""
    limits = budget.targets[target]
    rows = [
        judge_variant(evidence, budget, c, target)
        for c in candidates
        if (target, c.recipe) in evidence.costs or is_cost_expected(evidence, limits, c.recipe)
    ]
    rows = add_holm(rows, budget.alpha)
    best = pick_variant(evidence, rows, budget.alpha)
    return [row.model_copy(update={"recommended": row is best}) for row in rows]


def target_verdict(rows: list[Variant]) -> Verdict:
    if any(row.recommended for row in rows):
        return PASS
    return FAIL if rows and all(row.verdict == FAIL for row in rows) else INCONCLUSIVE


def study_verdict(
    rows: dict[str, list[Variant]], targets: dict[str, Target], alpha: float
) -> tuple[Verdict, str]:
    """PASS: something ships on every required target. FAIL: on one of them everything fails."""
    verdicts = {name: target_verdict(rows[name]) for name, target in targets.items() if target.required}
    order: list[Verdict] = [FAIL, INCONCLUSIVE, PASS]
    verdict = min(verdicts.values(), key=order.index)
    if verdict != PASS:
        name = next(name for name, value in verdicts.items() if value == verdict)
        return verdict, target_sentence(verdict, name, rows[name], alpha)
    return PASS, "; ".join(target_sentence(PASS, name, rows[name], alpha) for name in verdicts)


def share_sentence(share: KeptShare) -> str:
    if share.point is None:
        return "keeps the asked share of the method's gain"
    return f"keeps {share.point:.2f} of the method's gain (95 % interval {share.low:.2f} to {share.high:.2f})"


def closest_variant(rows: list[Variant], verdict: Verdict) -> Variant:
    """The row of this verdict with the fewest parts in its way; compressed ones first."""
    candidates = [row for row in rows if row.verdict == verdict]
    return min(candidates, key=lambda r: (sum(p.verdict != PASS for p in r.parts), r.recipe == PLAIN))


def target_sentence(verdict: Verdict, target: str, rows: list[Variant], alpha: float) -> str:
    """One sentence that a manager understands."""
    if verdict == PASS:
        best = next(row for row in rows if row.recommended)
        return f"on {target} ship {best.recipe}: it {share_sentence(best.kept_share)} and meets every limit"
    if rows and (assay := rows[0].parts[0]).verdict != PASS:
        cannot = "the study cannot see the gain that it should judge: "
        return assay.reason if assay.verdict == FAIL else cannot + assay.reason
    if verdict == FAIL:
        best = closest_variant(rows, FAIL)
        return f"on {target} every variant fails; {best.recipe}: {best.reason}"
    if slow := [row.recipe for row in rows if is_shippable(row, alpha)]:
        return (
            f"on {target} nothing can be recommended: each that passes ({', '.join(slow)}) is slower in "
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


def evaluate_gate(evidence: Evidence, budget: Budget) -> GateFile:
    """The whole of gate.json: the same evidence gives the same bytes."""
    shares = bootstrap_shares(evidence)
    known = prefixes(evidence.study)
    candidates = [
        build_candidate(evidence, budget, shares, recipe, known.get(recipe, []))
        for recipe in evidence.recipes
    ]
    rows = {target: judge_target(evidence, budget, candidates, target) for target in budget.targets}
    verdict, reason = study_verdict(rows, budget.targets, budget.alpha)
    gains = {name: estimate(evidence.gain(name, GAIN)) for name in evidence.columns}
    settings = budget.model_dump(mode="json")
    return GateFile(
        study=evidence.study.name,
        title=evidence.study.title,
        method=evidence.study.method.name,
        verdict=verdict,
        reason=reason,
        notes=list_caveats(evidence, budget),
        recommended={name: next((r.recipe for r in rows[name] if r.recommended), None) for name in rows},
        budget={**settings, "hash": digest(settings), "asked_by_study": evidence.study.budget},
        seeds=evidence.study.seeds,
        documents={name: len(columns) for name, columns in evidence.columns.items()},
        clusters={name: len(clusters.starts) for name, clusters in evidence.clusters.items()},
        teacher_gain=gains[VALIDATION],
        teacher_gain_slices={name: gain for name, gain in gains.items() if name != VALIDATION},
        scores={
            arm: {name: estimate(evidence.scores(name, arm), tested=False) for name in evidence.columns}
            for arm in evidence.arms
        },
        kept_by_student=student_shares(evidence, shares),
        power=retention_power(evidence, budget),
        variants=[row for name in rows for row in rows[name]],
        quality=collect_qualities(evidence, next(iter(rows.values()))),
        test_set=summarize_openings(evidence.openings, evidence.artifacts, digest(settings)),
        provenance=Provenance(
            config=evidence.study.hash(),
            data=evidence.data,
            machines=evidence.machines,
            versions=evidence.versions,
            artifacts=evidence.artifacts,
            records=evidence.records,
        ),
    )


def judge(run: str | Path, budget: str | None = None) -> GateFile:
    """What `python -m eval.gate` writes into gate.json of a run folder; nothing is written here.

    Args:
        budget: another budget than the study's, a name or a YAML file.

    Raises:
        UserError: the run is not trained, or a record is missing or does not belong to it.
    """
    study = load_study(run)
    check_trained(study)
    limits = load_budget(study, budget)
    return evaluate_gate(collect_evidence(study.folder, study, limits), limits)
