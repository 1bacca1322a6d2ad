"""Opens the test documents for one variant: the estimate to quote, for nothing was chosen by them.

    python -m eval.gate.test_set --study runs/NAME --by WHO [--variant NAME] [--reason TEXT]

Scores the base, the students and the variant on the test documents and judges assay, retention, guard and
fallback there, and assay and retention on the test documents of mandatory slices, where there are such.
Default: the variant that the gate recommends. The opening is written down before anything is scored, and
counted and shown ever after; another one needs a reason. Exit codes as those of the gate.
"""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from eval.core.artifacts import digest, read_manifest
from eval.core.budget import Budget
from eval.core.checks import CE, TEACHERS, Artifacts, artifact_folder
from eval.core.commands import STYLES, new_parser, study_from_command, text_line, write_json
from eval.core.documents import TEST, part_of_test, read_documents
from eval.core.errors import EXITS, UserError, entry, require_one_of
from eval.core.gate_file import GateFile, Opening
from eval.core.jobs import Job, Report, lock_folder, run_jobs
from eval.core.plan import budget_of_run
from eval.core.records import PLAIN, each_score
from eval.core.study import Study
from eval.engines import subject_of
from eval.gate.decision import evaluate_gate, read_before, share_sentence
from eval.gate.evidence import Evidence, Model, ScoreTables, build_evidence, collect_evidence, wanted_models
from eval.gate.history import link_of, opening_path, write_opening
from eval.gate.quality import (
    GAIN,
    Shares,
    assay_part,
    estimate,
    fallback_part,
    gain_over_base,
    guard_part,
    kept_gain,
    retention_part,
    slice_parts,
)
from eval.gate.verdicts import hold_failures, join_verdicts


def models_to_score(study: Study, recipe: str) -> list[Model]:
    """(arm, recipe) of what is judged: B, T1, T0, S1 and S0, and the variants of S1 and S0."""
    recipes = [PLAIN] if recipe == PLAIN else [PLAIN, recipe]
    return [model for model in wanted_models(study, recipes) if model[0] != CE]


def choose_variant(gate: GateFile, evidence: Evidence, variant: str | None) -> tuple[str, str | None]:
    """The variant to open the documents for, and the target that it was recommended for."""
    picks = {recipe: target for target, recipe in reversed(gate.recommended.items()) if recipe is not None}
    if variant is not None:
        require_one_of("variant", variant, evidence.recipes)
        return variant, picks.get(variant)
    if len(picks) != 1:
        problem = f"the gate recommends {', '.join(sorted(picks)) or 'none'}"
        raise UserError("variant to open the test documents for", problem, "name it with --variant")
    return next(iter(picks.items()))


def check_teachers(evidence: Evidence) -> None:
    """The teachers were scored on the test documents where they were made; only there can they run.

    Raises:
        UserError: there are no test documents, or a teacher was not scored on them.
    """
    if not read_documents(evidence.folder / "data", TEST):
        raise UserError(f"run {evidence.folder}", "no test documents", "set data.test and train again")
    scored = {
        (r.arm, r.seed): r.provenance.artifact
        for r in each_score(evidence.folder, "test")
        if r.arm in TEACHERS
    }
    for arm in TEACHERS:
        for seed in evidence.study.seeds:
            if scored.get((arm, seed)) != evidence.artifacts[f"{arm}/s{seed}/{PLAIN}"]:
                raise UserError(
                    f"teacher {arm} of seed {seed}",
                    "not scored on the test documents",
                    f"run absorb train --config {evidence.folder}: a teacher is scored while it is trained",
                )


def next_opening(
    evidence: Evidence, budget: Budget, recipe: str, target: str | None, by: str, reason: str | None
) -> Opening:
    """The next opening, or the last one where it was cut short before anything could be seen.

    Raises:
        UserError: the documents were opened before, and no reason is given.
    """
    names = {
        f"{arm}/s{seed}/{model_recipe}"
        for arm, model_recipe in models_to_score(evidence.study, recipe)
        for seed in evidence.study.seeds
    }
    new = Opening(
        number=(number := len(evidence.openings) + 1),
        previous=link_of(evidence.folder, number),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        by=by,
        reason=reason if evidence.openings else None,
        recipe=recipe,
        target=target,
        budget=digest(budget.model_dump(mode="json")),
        config=evidence.study.hash(),
        data=evidence.data,
        artifacts={name: sha for name, sha in sorted(evidence.artifacts.items()) if name in names},
    )
    if evidence.openings:
        last = evidence.openings[-1]
        same = (last.recipe, last.artifacts, last.budget) == (new.recipe, new.artifacts, new.budget)
        if last.verdict is None and same:
            return last
        if not reason:
            raise UserError(
                f"test documents of {evidence.folder}",
                f"opened {last.number} time(s), last for {last.recipe} by {last.by} at {last.time}",
                "a further look is no longer blind: give --reason to have it counted",
            )
    return new


def _score(run: Path, study: Study, folder: Path, report: Report) -> None:
    from eval.score.scoring import score_folder  # torch takes a second to import: not for --help

    score_folder(run, study, folder, report, kind="test")


def score_test_set(evidence: Evidence, recipe: str) -> None:
    """Scores every model that can be loaded anew, each in a process that did not make it."""
    jobs = []
    for arm, model_recipe in models_to_score(evidence.study, recipe):
        for seed in evidence.study.seeds:
            if place := artifact_folder(evidence.folder, arm, seed, model_recipe):
                name = subject_of(read_manifest(place)).label
                jobs.append(Job(name, _score, (evidence.folder, evidence.study, place)))
    run_jobs("test", jobs, evidence.study.workers)


def judge_test_set(evidence: Evidence, budget: Budget, opening: Opening) -> Opening:
    """The opening with what the test documents say."""
    recipe, alpha = opening.recipe, budget.alpha
    artifacts = Artifacts(evidence.folder, evidence.study)
    tables = ScoreTables(
        artifacts, each_score(evidence.folder, "test"), models_to_score(evidence.study, recipe)
    )
    on_test = build_evidence(tables, [PLAIN, recipe], {})
    tests = [
        assay_part(on_test, TEST, alpha),
        retention_part(on_test, recipe, TEST, budget.f, alpha),
        guard_part(on_test, recipe, budget, TEST),
        fallback_part(on_test, recipe, alpha, TEST),
    ]
    tests[0] = tests[0].model_copy(update={"name": "assay"})
    shifted = {name: part_of_test(name) for name in budget.slices if part_of_test(name) in on_test.columns}
    for name, place in shifted.items():
        for part in slice_parts(on_test, recipe, place, budget.slices[name], alpha):
            tests.append(part.model_copy(update={"name": part.name.replace(place, name)}))
    parts = hold_failures(tests, alpha)
    shares = Shares(on_test, alpha, {}, np.empty((0, 0)))
    return opening.model_copy(
        update={
            "documents": len(on_test.columns[TEST]),
            "verdict": join_verdicts(parts),
            "parts": parts,
            "teacher_gain": estimate(on_test.gain(TEST, GAIN), alpha),
            "kept_share": shares.of(kept_gain(recipe), GAIN, TEST),
            "guard_share": shares.of(gain_over_base(recipe), gain_over_base(PLAIN), TEST),
            "slices": {name: shares.of(kept_gain(recipe), GAIN, place) for name, place in shifted.items()},
        }
    )


def print_opening(console: Console, opening: Opening, path: Path, alpha: float) -> None:
    assert opening.verdict is not None
    assert opening.kept_share is not None
    for part in opening.parts:
        console.print(
            Text.assemble(f"{part.name}: ", (part.verdict, STYLES[part.verdict]), f" - {part.reason}")
        )
    share = "its share is undefined"
    if opening.kept_share.point is not None:
        share = share_sentence(opening.kept_share, alpha)
    console.print(
        Text.assemble(
            (opening.verdict, STYLES[opening.verdict]),
            f": {opening.recipe} on {opening.documents} test documents, opening {opening.number}: {share}",
        ),
        soft_wrap=True,
    )
    for name, kept in opening.slices.items():
        if kept.point is not None:
            console.print(Text(f"on the test documents of {name} it {share_sentence(kept, alpha)}"))
    console.print(Text(f"written to {path}; run the gate and the report again to show it"), soft_wrap=True)


@entry
def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--by", type=text_line, required=True, help="who opens them; it is written down")
    parser.add_argument("--variant", help="default: the variant that the gate recommends")
    parser.add_argument("--reason", type=text_line, help="why they are opened again")
    parser.add_argument("--budget", help="another budget than the run's fixed one: a name or a YAML file")
    study, args = study_from_command(parser, measures=True)
    folder = study.folder
    budget = budget_of_run(study, args.budget)
    with lock_folder(folder):
        evidence = collect_evidence(folder, study, budget)
        recipe, target = choose_variant(
            evaluate_gate(evidence, budget, read_before(folder)), evidence, args.variant
        )
        check_teachers(evidence)
        opening = next_opening(evidence, budget, recipe, target, args.by, args.reason)
        write_opening(folder, opening)
        score_test_set(evidence, recipe)
        opening = judge_test_set(evidence, budget, opening)
        write_opening(folder, opening)
    print_opening(Console(), opening, opening_path(folder, opening.number), budget.alpha)
    write_json(args.json, opening)
    assert opening.verdict is not None
    return EXITS[opening.verdict]


if __name__ == "__main__":
    main()
