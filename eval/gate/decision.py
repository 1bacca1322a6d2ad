"""From evidence to verdicts: each recipe on each target, what to ship there, and the study as a whole."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from eval.core.artifacts import digest, tool_text
from eval.core.budget import Budget, Target
from eval.core.checks import CONTROL, STUDENT
from eval.core.commands import level_text
from eval.core.errors import UserError
from eval.core.gate_file import (
    Fixed,
    GateFile,
    Hashes,
    KeptShare,
    OnTestSet,
    Part,
    Provenance,
    Rival,
    Slice,
    Variant,
    read_gate,
)
from eval.core.plan import budget_of_run
from eval.core.records import PLAIN, VALIDATION
from eval.core.sections.classification import BITS, in_words
from eval.core.study import Study, check_trained, load_study, read_recipe
from eval.gate.caveats import (
    compare_extents,
    compare_plan,
    describe_runs,
    extent_of,
    list_anomalies,
    list_caveats,
)
from eval.gate.evidence import Evidence, collect_evidence
from eval.gate.history import add_run, read_runs, summarize_openings
from eval.gate.limits import (
    commands_to_measure,
    cost_parts,
    is_cost_expected,
    measured_load,
    reference_costs,
    variant_costs,
)
from eval.gate.pick import add_holm, compare_variants, rank_variants
from eval.gate.quality import (
    GAIN,
    Shares,
    bootstrap_shares,
    compare_rivals,
    describe_harms,
    estimate,
    gain_over_base,
    harms_of_rivals,
    kept_gain,
    quality_parts,
    retention_power,
    share_chain,
    student_shares,
)
from eval.gate.secondary import collect_classes, collect_qualities
from eval.gate.verdicts import explain_verdict, hold_failures, is_shared, join_verdicts, slice_verdict
from eval.stats.crossed import FAIL, INCONCLUSIVE, PASS, Verdict


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
    fields = {
        "recipe": recipe,
        "engine": evidence.engines[recipe],
        "p": max(part.p or 0.0 for part in parts if not is_shared(part)),
        "kept_share": shares.of(kept_gain(recipe), GAIN),
        "kept_of_student": shares.of(kept_gain(recipe), kept_gain(PLAIN)),
        "guard_share": shares.of(gain_over_base(recipe), gain_over_base(PLAIN)),
        "chain": share_chain(shares, prefixes, recipe),
        **evidence.weights.get(recipe, {}),
        "scores": {
            name: estimate(evidence.scores(name, STUDENT, recipe), budget.alpha, tested=False)
            for name in evidence.columns
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
        on_cost = cost_parts(evidence, target, candidate.recipe, limits, cost, budget.alpha)
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
        remedy="measuring it",
    )


def judge_target(
    evidence: Evidence, budget: Budget, candidates: list[Candidate], target: str
) -> tuple[list[Variant], list[str]]:
    """Rows of one target, the recommended one marked, and the recipes that are as good."""
    limits = budget.targets[target]
    rows = [
        judge_variant(evidence, budget, c, target)
        for c in candidates
        if (target, c.recipe) in evidence.costs or is_cost_expected(evidence, limits, c.recipe)
    ]
    rows = add_holm(rows, budget.alpha)
    ranked = rank_variants(evidence, rows, budget.alpha)
    marked = [row.model_copy(update={"recommended": row in ranked[:1]}) for row in rows]
    return marked, [row.recipe for row in ranked[1:]]


def target_verdict(rows: list[Variant]) -> Verdict:
    if any(row.recommended for row in rows):
        return PASS
    return FAIL if rows and all(row.verdict == FAIL for row in rows) else INCONCLUSIVE


def study_verdict(
    rows: dict[str, list[Variant]],
    as_good: dict[str, list[str]],
    targets: dict[str, Target],
    alpha: float,
    on_test: OnTestSet | None,
) -> tuple[Verdict, str]:
    """PASS: something ships on every required target. FAIL: on one of them everything fails."""
    verdicts = {name: target_verdict(rows[name]) for name, target in targets.items() if target.required}
    order: list[Verdict] = [FAIL, INCONCLUSIVE, PASS]
    verdict = min(verdicts.values(), key=order.index)
    names = [name for name, value in verdicts.items() if value == verdict]
    if verdict != PASS:
        return verdict, target_sentence(verdict, names[0], rows[names[0]], alpha)
    sentences = [shipping_sentence(name, rows[name], as_good[name], alpha, on_test) for name in names]
    return PASS, "; ".join(sentences)


def share_sentence(share: KeptShare, alpha: float) -> str:
    if share.point is None:
        return "keeps the asked share of the method's gain"
    interval = f"{level_text(1 - 2 * alpha)} interval {share.low:.2f} to {share.high:.2f}"
    return f"keeps {share.point:.2f} of the method's gain ({interval})"


def closest_variant(rows: list[Variant], verdict: Verdict) -> Variant:
    """The row of this verdict with the fewest parts in its way; compressed ones first."""
    candidates = [row for row in rows if row.verdict == verdict]
    return min(candidates, key=lambda r: (sum(p.verdict != PASS for p in r.parts), r.recipe == PLAIN))


def shipping_sentence(
    target: str, rows: list[Variant], as_good: list[str], alpha: float, on_test: OnTestSet | None
) -> str:
    """What ships on a target, in one sentence that a manager understands.

    The share is that of the test documents once they were opened for it: on the validation documents it was
    picked, and is a little too good there.
    """
    best = next(row for row in rows if row.recommended)
    others = f" (as good: {', '.join(as_good)})" if as_good else ""
    share = share_sentence(best.kept_share, alpha)
    if on_test and on_test.current and on_test.recipe == best.recipe and on_test.kept_share:
        share = f"{share_sentence(on_test.kept_share, alpha)} on the test documents"
    return f"on {target} ship {best.recipe}{others}: it {share} and meets every limit"


def target_sentence(verdict: Verdict, target: str, rows: list[Variant], alpha: float) -> str:
    """Why nothing ships on a target, in one sentence that a manager understands."""
    if rows and (assay := rows[0].parts[0]).verdict != PASS:
        cannot = "the study cannot see the gain that it should judge: "
        return assay.reason if assay.verdict == FAIL else cannot + assay.reason
    if verdict == FAIL:
        best = closest_variant(rows, FAIL)
        return f"on {target} every variant fails; {best.recipe}: {best.reason}"
    if passed := [row for row in rows if row.verdict == PASS]:
        best = min(passed, key=lambda row: row.p)
        return (
            f"on {target} {best.recipe} passes alone, but not after the correction for choosing among "
            f"several variants (Holm p = {best.holm_p:.3f}, asked {alpha:g})"
        )
    best = closest_variant(rows, INCONCLUSIVE)
    return f"on {target} no variant passes yet; {best.recipe}: {best.reason}"


def headline(
    verdict: Verdict, reason: str, rivals: list[Rival], seeds: list[int], fixed: Fixed | None
) -> str:
    """The reason, and in front what must not be missed.

    A simpler rival that wins, two seeds alone, and a budget that is not the fixed one.
    """
    for rival in (one for one in rivals if one.beats):
        better = f"{rival.what} is better by {rival.lead.point:.3f} bits/byte, {rival.lead.low:.3f} at least"
        before = f"absorbed, and not worth it: {better}; {reason}"
        reason = before if verdict == PASS else f"{reason}; {better}"
    reason = f"from two seeds alone: {reason}" if len(seeds) == 2 else reason
    return f"by another budget than the fixed one: {reason}" if fixed and fixed.other else reason


def prefixes(study: Study) -> dict[str, list[str]]:
    """Recipe -> the recipes of the study whose passes it begins with, the shortest first."""
    passes = {file.name: file.passes for _, file in map(read_recipe, study.recipes)}
    return {
        name: sorted(
            (
                other
                for other, first in passes.items()
                if len(first) < len(own) and own[: len(first)] == first
            ),
            key=lambda other: len(passes[other]),
        )
        for name, own in passes.items()
    }


def evaluate_gate(evidence: Evidence, budget: Budget, before: GateFile | None = None) -> GateFile:
    """The whole of gate.json: the same evidence gives the same bytes, but for the time of a new verdict.

    Args:
        before: the verdict that lies in the run folder; what it rested on and is gone since is named.
    """
    shares = bootstrap_shares(evidence, budget.alpha)
    known = {
        recipe: [other for other in others if other in evidence.recipes]
        for recipe, others in prefixes(evidence.study).items()
    }
    candidates = [
        build_candidate(evidence, budget, shares, recipe, known.get(recipe, []))
        for recipe in evidence.recipes
    ]
    judged = {target: judge_target(evidence, budget, candidates, target) for target in budget.targets}
    rows = {target: marked for target, (marked, _) in judged.items()}
    as_good = {target: others for target, (_, others) in judged.items()}
    recommended = {name: next((r.recipe for r in rows[name] if r.recommended), None) for name in rows}
    settings = budget.model_dump(mode="json")
    on_test = summarize_openings(evidence.openings, evidence.artifacts, digest(settings))
    verdict, reason = study_verdict(rows, as_good, budget.targets, budget.alpha, on_test)
    rivals = compare_rivals(evidence, budget.alpha)
    harms = harms_of_rivals(evidence, budget.alpha)
    gains = {name: estimate(evidence.gain(name, GAIN), budget.alpha) for name in evidence.columns}
    runs = read_runs(evidence.folder, before, evidence.plan, evidence.openings)
    extent, shrunk = compare_extents(extent_of(evidence), runs, before)
    fixed = compare_plan(evidence, budget, runs)
    gate = GateFile(
        study=evidence.study.name,
        title=evidence.study.title,
        task=evidence.study.task,
        folder=evidence.folder.as_posix(),
        method=evidence.study.method.name,
        verdict=verdict,
        reason=headline(verdict, reason, rivals, evidence.study.seeds, fixed),
        anomalies=[*shrunk, *list_anomalies(evidence, known, budget.alpha)],
        notes=[*list_caveats(evidence, budget, fixed), *describe_harms(harms)],
        recommended=recommended,
        as_good=as_good,
        level=1 - 2 * budget.alpha,
        budget={**settings, "hash": digest(settings), "asked_by_study": evidence.study.budget},
        seeds=evidence.study.seeds,
        documents={name: len(columns) for name, columns in evidence.columns.items()},
        clusters={name: len(clusters.starts) for name, clusters in evidence.clusters.items()},
        teacher_gain=gains[VALIDATION],
        teacher_gain_slices={name: gain for name, gain in gains.items() if name != VALIDATION},
        scores={
            arm: {
                name: estimate(evidence.scores(name, arm), budget.alpha, tested=False)
                for name in evidence.columns
            }
            for arm in evidence.arms
        },
        kept_by_student=student_shares(evidence, shares),
        rivals=rivals,
        below_base=harms,
        power=retention_power(evidence, budget),
        variants=[row for name in rows for row in rows[name]],
        references=reference_costs(evidence, budget.targets, recommended, budget.alpha),
        comparisons=compare_variants(evidence, budget.alpha),
        quality=collect_qualities(evidence, next(iter(rows.values())), budget.alpha),
        classes=collect_classes(evidence, budget.alpha),
        test_set=on_test,
        fixed=fixed,
        extent=extent,
        provenance=Provenance(
            tool=tool_text(),
            times=evidence.times,
            config=evidence.study.hash(),
            data=evidence.data,
            machines=evidence.machines,
            versions=evidence.versions,
            artifacts=evidence.artifacts,
            records=evidence.records,
        ),
    )
    runs = add_run(runs, gate, extent_of(evidence), evidence.folder, evidence.openings)
    gate = gate.model_copy(update={"runs": runs, "notes": [*gate.notes, *describe_runs(fixed, runs)]})
    return GateFile.model_validate_json(in_words(gate.model_dump_json(), gate.task, BITS))


def judge(run: str | Path, budget: str | None = None) -> GateFile:
    """What `python -m eval.gate` writes into gate.json of a run folder; nothing is written here.

    Args:
        budget: another budget than the one that was fixed in the run, a name or a YAML file.

    Raises:
        UserError: the run is not trained, or a record is missing or does not belong to it.
    """
    study = load_study(run)
    check_trained(study)
    limits = budget_of_run(study, budget)
    return evaluate_gate(collect_evidence(study.folder, study, limits), limits, read_before(study.folder))


def read_before(run: Path) -> GateFile | None:
    """The verdict that lies in a run folder; None where there is none that this version reads."""
    try:
        return read_gate(run)
    except UserError:
        return None
