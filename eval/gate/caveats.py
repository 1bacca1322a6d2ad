"""What a verdict is conditional on, in sentences that stand beside it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import product

from eval.core.artifacts import describe_accepted, digest, read_manifest
from eval.core.budget import Budget, load_budget
from eval.core.checks import CE, SLACK, STUDENT, TEACHERS, artifact_folder, read_unbuilt
from eval.core.errors import UserError
from eval.core.gate_file import Extent, Fixed, GateFile, GateRun
from eval.core.plan import Plan, current_recipes, list_changes, list_recipe_changes
from eval.core.records import PLAIN, VALIDATION, CostRecord, LoadRecord
from eval.core.study import recipe_names
from eval.gate.evidence import Contrast, Evidence
from eval.gate.quality import RESOLUTION, harm_of, rivals_of, untaught
from eval.stats.crossed import PASS, crossed_mean
from eval.stats.multiplicity import holm

FEW_CLUSTERS = 10


def list_caveats(evidence: Evidence, budget: Budget, fixed: Fixed | None) -> list[str]:
    """Plain sentences for the `notes` of gate.json; none where there is nothing to say."""
    caveats = [*_plan(budget, fixed), *_shared_teacher(evidence)]
    if len(evidence.study.seeds) == 2:
        caveats.append(
            "two seeds tell little of others: a false PASS is somewhat likelier than alpha, and power is low"
        )
    if early := evidence.early:
        caveats.append(
            f"{len(early)} record(s) are dated before their artifact was made, the first {early[0]}: the "
            "bytes are those that were measured, so either they were made again since, or a clock went back"
        )
    return [
        *caveats,
        *_few_clusters(evidence, budget),
        *_scored_elsewhere(evidence),
        *_own_training_of_ce(evidence),
        *_spoiled_ce(evidence),
        *_mixed_machines(evidence),
        *_computed_otherwise(evidence),
        *_test_documents(evidence),
        *_not_built(evidence),
        *describe_accepted(evidence.folder),
    ]


def list_anomalies(evidence: Evidence, begins_with: Mapping[str, list[str]], alpha: float) -> list[str]:
    """What is better than it should be by more than noise, and what to look at; Holm over all that could be.

    A compressed variant has less to work with than its student, or than a recipe that it begins with, and a
    student saw no more than its teacher: on the validation documents, and on those of every shifted slice.

    Args:
        begins_with: recipe -> those that it begins with, the shortest first.
    """
    cases: dict[Contrast, str] = {}
    for recipe in evidence.recipes[1:]:
        made = f"{recipe} is better than the student that it was made of"
        cases[Contrast(STUDENT, STUDENT, recipe, PLAIN)] = made
        for before in begins_with.get(recipe, [])[-1:]:
            cases[Contrast(STUDENT, STUDENT, recipe, before)] = f"{recipe} is better than {before} before it"
    cases[Contrast(STUDENT, TEACHERS[0])] = f"the student {STUDENT} is better than its teacher {TEACHERS[0]}"
    pairs = list(product(cases, evidence.columns))
    means = [crossed_mean(evidence.gain(name, contrast)) for contrast, name in pairs]
    found: dict[Contrast, list[str]] = {}
    adjusted = holm([mean.p_at_most(RESOLUTION) for mean in means])
    for (contrast, name), mean, p in zip(pairs, means, adjusted, strict=True):
        if p <= alpha:
            by = f"by {mean.point:.4f} bits/byte (p = {p:.2g}) on {name}"
            found.setdefault(contrast, []).append(by)
    anomalies = []
    for contrast, seen in found.items():
        check = "does it see validation documents in calibration or recovery, is its student trained out?"
        if contrast.recipe == PLAIN:
            check = "was it trained longer, or on other rows, or does its own data term teach it?"
        told = f"{cases[contrast]} {'; '.join(seen)} (p by Holm over {len(pairs)} comparisons)"
        anomalies.append(f"{told}: {check}")
    return anomalies


def extent_of(evidence: Evidence) -> Extent:
    return Extent(
        seeds=len(evidence.study.seeds),
        documents={name: len(columns) for name, columns in evidence.columns.items()},
        variants=len(evidence.costs),
        records=len(evidence.records),
        rivals=list(rivals_of(evidence)),
    )


def compare_extents(
    now: Extent, runs: Sequence[GateRun], before: GateFile | None
) -> tuple[Extent, list[str]]:
    """The most evidence of all verdicts, and what of it is gone: a set that shrank is a choice."""
    every = [now, *(one.extent for one in runs if one.extent), *([before.extent] if before else [])]
    slices = dict.fromkeys(name for one in every for name in one.documents)
    most = Extent(
        seeds=max(one.seeds for one in every),
        documents={name: max(one.documents.get(name, 0) for one in every) for name in slices},
        variants=max(one.variants for one in every),
        records=max(one.records for one in every),
        rivals=list(dict.fromkeys(name for one in every for name in one.rivals)),
    )
    counts = {f"documents of {name}": (most.documents[name], now.documents.get(name, 0)) for name in slices}
    counts |= {name: (getattr(most, name), getattr(now, name)) for name in ("seeds", "records")}
    counts["variants measured, summed over targets"] = most.variants, now.variants
    lost = [f"{was} {name}, now {is_}" for name, (was, is_) in counts.items() if is_ < was]
    lost += [f"the rival {name}, now not" for name in most.rivals if name not in now.rivals]
    why = "an earlier verdict of this run rested on more evidence: "
    return most, [f"{why}{'; '.join(lost)}"] if lost else []


def compare_plan(evidence: Evidence, budget: Budget, runs: Sequence[GateRun]) -> Fixed | None:
    """How a verdict by `budget` stands to what was fixed when training began, and to the verdicts before."""
    plan, study = evidence.plan, evidence.study
    if plan is None:
        return None
    other = budget != plan.budget
    changes = [f"{change} in the budget that judges here" for change in list_changes(plan.budget, budget)]
    try:
        own = load_budget(study)
    except UserError:  # the copy is what counts: its file may lie on another machine
        own = plan.budget
    changes += [
        f"{change} in the file of the budget, by which nothing is judged here"
        for change in list_changes(plan.budget, own)
    ]
    changes += [f"recipe {change}" for change in list_recipe_changes(plan.recipes, current_recipes(study))]
    changes += _built_otherwise(evidence, plan)
    late = datetime.fromisoformat(plan.time) > datetime.fromisoformat(evidence.first) + SLACK
    late = late or _replaced_after_a_verdict(plan, runs)
    return Fixed(
        time=plan.time, hash=plan.hash, budget=plan.budget.name, other=other, late=late, changes=changes
    )


def _replaced_after_a_verdict(plan: Plan, runs: Sequence[GateRun]) -> bool:
    """Was there a verdict by an earlier plan of another budget?"""
    budgets = {plan.hash: plan.budget_hash()} | {one.hash: one.budget for one in plan.earlier}
    return any(budgets.get(one.plan) != plan.budget_hash() for one in runs)


def _built_otherwise(evidence: Evidence, plan: Plan) -> list[str]:
    """Variants that were built by another recipe than the fixed one of their name."""
    changes = []
    for recipe in evidence.recipes[1:]:
        place = artifact_folder(evidence.folder, STUDENT, evidence.study.seeds[0], recipe)
        built, fixed = place and read_manifest(place).facts.get("recipe_file"), plan.recipes.get(recipe)
        if built and fixed and built != digest(fixed.model_dump(mode="json")):
            changes.append(f"the variants {recipe} were built by another recipe")
    return changes


def doubt_budget(name: str, fixed: Fixed | None) -> list[str]:
    """Why the budget `name` is not the one that was fixed before the first figure; empty where it is."""
    if fixed is None:
        why = "nothing shows that it is older than the figures"
        return [f"no budget was fixed when this run was trained: {why}"]
    doubts = []
    if fixed.other:
        doubts.append(f"judged by another budget, {name!r}, than the one fixed on {fixed.time}")
    if fixed.late:
        doubts.append(f"the budget was fixed on {fixed.time}, after the first figure or verdict")
    return doubts


def _plan(budget: Budget, fixed: Fixed | None) -> list[str]:
    """A budget, or a recipe, that was chosen with figures at hand is a choice among several."""
    notes = doubt_budget(budget.name, fixed)
    if fixed is not None and fixed.changes:
        notes.append(f"changed since {fixed.time}: {'; '.join(fixed.changes)}")
    return notes


def describe_runs(fixed: Fixed | None, runs: list[GateRun]) -> list[str]:
    """How often the gate judged this run, by which budgets, and what changed since the verdict before."""
    if len(runs) < 2 and not (fixed and fixed.other):
        return []
    counts = Counter((run.budget, run.budget_hash[:8]) for run in runs)
    budgets = ", ".join(f"{name!r} ({short}): {count}" for (name, short), count in counts.items())
    verdicts = "1 verdict" if len(runs) == 1 else f"{len(runs)} different verdicts"
    said = f"the gate gave {verdicts} since {runs[0].time}, by budget {budgets}"
    if not runs[1:]:
        return [said]
    return [f"{said}; changed since the verdict before: {_moved(*runs[-2:])}"]


def _moved(before: GateRun, now: GateRun) -> str:
    """What differs between two verdicts of a run."""
    moved = []
    if before.budget_hash != now.budget_hash:
        moved.append("the budget")
    if before.plan != now.plan:
        moved.append("the plan")
    if before.openings != now.openings or before.opening != now.opening:
        moved.append("what the test documents said")
    if before.evidence != now.evidence:
        counts = [f"{one.extent.records} records" for one in (before, now) if one.extent]
        moved.append(f"the evidence ({', now '.join(counts)})")
    return f"{', '.join(moved)}; {before.verdict}, now {now.verdict}"


def _shared_teacher(evidence: Evidence) -> list[str]:
    """Seeds that share a teacher say nothing about how much another draw of that teacher would differ."""
    treated, seeds = TEACHERS[0], evidence.study.seeds
    teachers = Counter(evidence.artifacts[f"{treated}/s{seed}/{PLAIN}"] for seed in seeds)
    if len(seeds) < 2 or len(teachers) == len(seeds):
        return []
    if len(teachers) == 1:
        return [
            f"all {len(seeds)} seeds share one teacher {treated} ({next(iter(teachers))[:12]}): the verdict "
            "holds for this very teacher, and another one made in the same way may differ"
        ]
    return [
        f"{len(seeds)} seeds share {len(teachers)} teachers {treated}: how much teachers differ is seen "
        f"{len(teachers)} times only, and the bounds of its gain may be too narrow"
    ]


def _not_built(evidence: Evidence) -> list[str]:
    """Recipes of the study that are not judged, because they could not be applied."""
    unbuilt, names = read_unbuilt(evidence.folder), recipe_names(evidence.study)
    return [f"recipe {name} was not built: {why}" for name, why in unbuilt.items() if name in names]


def _few_clusters(evidence: Evidence, budget: Budget) -> list[str]:
    """Slices that are judged, whose documents lie in so few clusters that little is known of others."""
    counts = {name: len(evidence.clusters[name].starts) for name in [VALIDATION, *budget.slices]}
    return [
        f"the {len(evidence.columns[name])} documents of {name} lie in {count} clusters: what fewer than "
        f"{FEW_CLUSTERS} say of others is unsure, and power is low; take documents of more of them"
        for name, count in counts.items()
        if count < FEW_CLUSTERS
    ]


def _scored_elsewhere(evidence: Evidence) -> list[str]:
    """Scores that this project did not make, and whether some of one contrast were made otherwise."""
    if not evidence.elsewhere:
        return []
    parts = [f"{len(models)} by {by}, first {models[0]}" for by, models in evidence.elsewhere.items()]
    count = sum(map(len, evidence.elsewhere.values()))
    mixed = len(evidence.elsewhere) > 1 or count < len(evidence.artifacts)
    why = ": models that are compared were scored by different programs, which may differ" if mixed else ""
    return [f"scores were made elsewhere ({'; '.join(parts)}){why}"]


def _own_training_of_ce(evidence: Evidence) -> list[str]:
    """S1 over CE at its own best rate is another figure than S1 over CE at the rate of S1."""
    own = evidence.study.own_training_text(CE)
    asked = own and (CE, PLAIN) in evidence.bits
    return [f"CE was trained otherwise than S1, as ce_train says: {own}"] if asked else []


def _spoiled_ce(evidence: Evidence) -> list[str]:
    """A rival that its own training made worse is beaten by anything."""
    if (CE, PLAIN) not in evidence.bits or (harm := harm_of(evidence, CE)) is None:
        return []
    return [
        f"{untaught(evidence.study)} (CE) ended worse than the base that it began with, by "
        f"{harm:.2g} bits/byte: it is no rival; give it its own best rate with ce_train"
    ]


def _mixed_machines(evidence: Evidence) -> list[str]:
    """Costs in one table that were not measured on one machine with one set of libraries."""
    caveats = []
    for target in sorted({target for target, _ in evidence.costs}):
        sources = [
            record.provenance
            for records in (evidence.costs, evidence.loads)
            for (name, _), group in records.items()
            if name == target
            for record in group
        ]
        facts = [
            {**source.machine.model_dump(exclude={"host", "system"}), **source.versions} for source in sources
        ]
        for name in sorted({key for one in facts for key in one}):
            values = sorted({str(one.get(name, "unknown")) for one in facts})
            if len(values) > 1:
                caveats.append(
                    f"costs on {target} were measured with different {name} ({', '.join(values)}): their "
                    f"rows are not comparable; measure all again with absorb cost --target {target}"
                )
    return caveats


def _computed_otherwise(evidence: Evidence) -> list[str]:
    """Variants whose cost is that of another number format than the one they are stored in."""
    formats: dict[tuple[str, str], set[str]] = {}
    measured: list[tuple[tuple[str, str], Sequence[CostRecord | LoadRecord]]]
    measured = [*evidence.costs.items(), *evidence.loads.items()]
    for (target, recipe), records in measured:
        for process in (process for record in records for process in record.processes):
            if process.computed_in:
                formats.setdefault((target, process.computed_in), set()).add(recipe)
    return [
        f"on {target}, {', '.join(sorted(recipes))} computed in {dtype}: this machine is slower in the "
        "number format of the weights"
        for (target, dtype), recipes in formats.items()
    ]


def _test_documents(evidence: Evidence) -> list[str]:
    """The test documents are blind once, for what was judged then, and do not always agree."""
    caveats = [
        f"opening {opening.number} of the test documents ended in {opening.verdict} for {opening.recipe}: "
        "documents that nothing was chosen by do not confirm it"
        for opening in evidence.openings
        if opening.verdict not in (None, PASS)
    ]
    if len(evidence.openings) > 1:
        caveats.append(
            f"the test documents were opened {len(evidence.openings)} times: only the first look was blind "
            "to what others had said"
        )
    return caveats
