"""The verdict of a study: does the method's gain persist in a variant that its targets can afford?

`python -m eval.gate --study runs/NAME [--budget NAME]` reads the records of a run and writes `gate.json`.
Exit codes: 0 pass, 1 fail, 2 inconclusive, 3 error.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from eval.artifacts import digest, write_text
from eval.budget import Budget, load_budget
from eval.errors import EXIT_FAIL, EXIT_INCONCLUSIVE, EXIT_PASS, entry
from eval.evidence import Evidence, collect
from eval.judge import case, on_target, study_verdict
from eval.quality import GAIN, estimate, planning, shares, students
from eval.records import HELDOUT
from eval.statistics import FAIL, INCONCLUSIVE, PASS
from eval.study import study_from_command
from eval.verdict import GateFile, Provenance, Variant

EXITS = {PASS: EXIT_PASS, FAIL: EXIT_FAIL, INCONCLUSIVE: EXIT_INCONCLUSIVE}
STYLES = {PASS: "bold green", FAIL: "bold red", INCONCLUSIVE: "bold yellow"}


def judged(e: Evidence, budget: Budget) -> GateFile:
    """The whole of gate.json: the same evidence gives the same bytes."""
    found = shares(e)
    cases = [case(e, budget, found, recipe) for recipe in e.recipes]
    rows = {target: on_target(e, budget, cases, target) for target in budget.targets}
    verdict, reason = study_verdict(rows, budget.targets, budget.alpha)
    gains = {name: estimate(e.gain(name, GAIN)) for name in e.columns}
    return GateFile(
        study=e.study.name,
        title=e.study.title,
        method=e.study.method.name,
        verdict=verdict,
        reason=reason,
        recommended={name: next((r.recipe for r in rows[name] if r.recommended), None) for name in rows},
        budget=described(e, budget),
        seeds=e.study.seeds,
        documents={name: len(columns) for name, columns in e.columns.items()},
        teacher_gain=gains[HELDOUT],
        teacher_gain_slices={name: gain for name, gain in gains.items() if name != HELDOUT},
        scores={
            arm: {name: estimate(e.scores(name, arm), tested=False) for name in e.columns} for arm in e.arms
        },
        kept_by_student=students(e, found),
        power=planning(e, budget),
        variants=[row for name in rows for row in rows[name]],
        provenance=provenance(e),
    )


def described(e: Evidence, budget: Budget) -> dict[str, Any]:
    """The budget as it was read, its hash, and whether it is the one that the study names."""
    value = budget.model_dump(mode="json")
    return {**value, "hash": digest(value), "asked_by_study": e.study.budget}


def provenance(e: Evidence) -> Provenance:
    return Provenance(
        config=e.study.hash(),
        data=e.data,
        machines=e.machines,
        versions=e.versions,
        artifacts=e.artifacts,
        records=e.records,
    )


def line(row: Variant) -> Text:
    """One line per variant: what, where, how it went and why."""
    mark = " *" if row.recommended else ""
    return Text.assemble(
        f"{row.recipe}{mark} on {row.target}: ",
        (row.verdict, STYLES[row.verdict]),
        f" - {row.reason}",
        f"; run {row.how}" if row.how and row.verdict == INCONCLUSIVE else "",
    )


def show(console: Console, result: GateFile, path: Path) -> None:
    for row in result.variants:
        console.print(line(row), soft_wrap=True)
    console.print(
        Text.assemble((result.verdict, STYLES[result.verdict]), f": {result.reason}"), soft_wrap=True
    )
    console.print(Text(f"* recommended; the whole verdict lies in {path}"), soft_wrap=True)


@entry
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.gate", description=__doc__)
    parser.add_argument("--budget", help="another budget than the study's: a name or a YAML file")
    study, args = study_from_command(parser)
    folder = Path(args.study) if Path(args.study).is_dir() else study.folder
    budget = load_budget(study, args.budget)
    result = judged(collect(folder, study, budget), budget)
    path = folder / "gate.json"
    text = json.dumps(result.model_dump(mode="json"), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(path, text + "\n")
    show(Console(), result, path)
    return EXITS[result.verdict]


if __name__ == "__main__":
    main()
