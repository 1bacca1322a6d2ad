"""`python -m eval.compare --study A --study B ...`: the methods of several studies in one table.

Each study is trained and scored already. The `arms` of the first one, and `--row NAME=--KEY VALUE ...`, are
that study again with a change, trained and scored beside it in `runs/NAME-compare/`: a part left out, or a
rival. What both share is not made again. The p-values are those of "the student keeps nothing of a gain",
after Holm over the studies. Give the whole method first and then ever smaller parts: the smallest that keeps
as much, but for `--margin`, is named.
The result lies in `runs/NAME-compare/compare.json`.
"""

import argparse
import math
import sys
import time
from pathlib import Path

from rich.table import Table

from eval.challenge.rows import own_rows
from eval.challenge.runs import run_study, share_artifacts
from eval.compare.contrasts import ABSORBED, SERVED, Compared, ComparisonFile, compare, smallest
from eval.core.artifacts import write_text
from eval.core.budget import Budget
from eval.core.checks import check_plan
from eval.core.commands import NewFile, add_json, new_console, new_parser, stamp_line, write_json
from eval.core.errors import EXIT_PASS, UserError, entry
from eval.core.gate_file import GateFile, read_gate
from eval.core.plan import budget_of_run
from eval.core.study import Study, arm_studies, check_trained, load_study, study_text
from eval.gate.evidence import Evidence, collect_evidence
from eval.report.format import MISSING, TIMES, bounds_text
from eval.report.markdown import markdown_table

TITLES = {
    "study": "study",
    "gain": "teacher's gain T1 - T0",
    "lead": "student's lead S1 - S0",
    "share": "share",
    "over_ce": "S1 - CE",
    "over_first": "S1 - first S1",
    "decode_p50": "teacher's decode",
    "peak_memory": "teacher's memory",
    "holm_p": "p (Holm)",
    "result": "result",
    "verdict": "gate",
}


def beside(whole: Study) -> Path:
    """The folder of its rows, and of the result."""
    return whole.folder.with_name(f"{whole.name}-compare")


def plan_rows(whole: Study, texts: list[str]) -> list[Study]:
    """The first study again with one change each: its arms, then the rows of the command line."""
    folder = beside(whole)
    studies = [arm.model_copy(update={"runs": str(folder)}) for arm in arm_studies(whole)]
    if rows := own_rows(texts, whole.arms):
        folder.mkdir(parents=True, exist_ok=True)
        parent = folder / "study.yaml"
        write_text(parent, study_text(whole))
        studies += [row.study(parent, folder) for row in rows]
    return studies


def train_rows(whole: Study, studies: list[Study]) -> None:
    """Trains and scores the first study again with one change each; what is done is found by its keys."""
    for study in studies:
        check_plan(study)  # before the first is trained
    start = time.monotonic()
    for place, study in enumerate(studies, start=1):
        if not study.folder.exists():
            share_artifacts(whole.folder, study.folder)
        run_study(study)
        seconds = time.monotonic() - start
        rest = seconds / place * (len(studies) - place)
        text = f"{study.name} done, {place} of {len(studies)}, {seconds:.0f} s, about {rest:.0f} s left"
        print(f"compare: {text}", file=sys.stderr, flush=True)


def read_study(study: Study) -> tuple[Evidence, Budget]:
    """The evidence of the students as they are: variants need not be there."""
    check_trained(study)
    budget = budget_of_run(study)
    plain = study.model_copy(update={"recipes": []})
    return collect_evidence(study.folder, plain, budget), budget


def gate_of(study: Study) -> GateFile | None:
    return read_gate(study.folder) if (study.folder / "gate.json").is_file() else None


def cells(row: Compared, gate: GateFile | None) -> dict[str, str]:
    share = MISSING if row.share is None else "{:.2f} [{:.2f}, {:.2f}]".format(*row.share)
    served = {name: row.teacher.get(name) for name in SERVED}
    return {
        "study": row.study if row.study == row.method else f"{row.study} ({row.method})",
        "gain": bounds_text(row.gain),
        "lead": bounds_text(row.lead),
        "share": share,
        "over_ce": bounds_text(row.over_ce),
        "over_first": bounds_text(row.over_first),
        **{
            name: MISSING if one is None else f"{one.point:.1f}{TIMES} [{one.lower:.1f}, {one.upper:.1f}]"
            for name, one in served.items()
        },
        "holm_p": f"{row.holm_p:.2g}",
        "result": row.result,
        "verdict": MISSING if gate is None else gate.verdict,
    }


def notes(rows: list[Compared], margin: float, alpha: float) -> list[str]:
    """What stands under the table: CE's own training, pairs with the first, the smallest as good."""
    lines = [
        f"{row.study}: CE was trained otherwise than S1: {row.ce_otherwise}"
        for row in rows
        if row.ce_otherwise
    ]
    lines += [
        f"{row.study}: CE ended worse than the base by {row.ce_harm:.2g}: S1 - CE flatters S1"
        for row in rows
        if row.ce_harm is not None
    ]
    pairs = sum(row.behind is not None for row in rows)
    for row in rows[1:]:
        if row.behind is None or row.over_first is None or row.over_first_p is None:
            lines.append(f"{row.study}: other documents or seeds than {rows[0].study}: no pair with it")
        else:
            how = "better" if row.over_first.point > 0 else "worse"
            how = f"is {how} than" if row.over_first_p <= alpha else "is not shown to differ from"
            p = f"p = {row.over_first_p:.2g} of two sides after Holm over {pairs}"
            one = f"{row.study}: its S1 {how} that of {rows[0].study}"
            lines.append(f"{one}: {bounds_text(row.over_first)}, {p}")
            good = "it keeps more than" if row.as_good else "it is not shown to keep"
            pair = f"{row.study}: its lead is {bounds_text(row.behind)} behind that of {rows[0].study}"
            lines.append(f"{pair}, {good} {1 - margin:g} of its lead")
    named = smallest(rows)
    if any(row.behind is not None for row in rows[1:]):
        lines.append(
            f"the smallest, in the order given, that keeps as much: {named.study}"
            if named is not None
            else f"{rows[0].study} is not shown to be absorbed: there is nothing to keep"
        )
    return lines


def check_names(studies: list[Study]) -> None:
    """Refuses a study that is given twice, or called as another one or a row is."""
    for place, study in enumerate(studies):
        for other in studies[:place]:
            if study.folder.resolve() == other.folder.resolve() or study.name == other.name:
                problem = f"{study.name!r} of {other.folder} and of {study.folder}"
                raise UserError("--study", problem, "give studies of different names, each once")


def margin_type(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number between 0 and 1")
    return value


@entry
def main() -> int:
    parser = new_parser(__doc__)
    about = "a trained study's YAML file, name, or run folder; the first one is what others are compared with"
    parser.add_argument("--study", action="append", required=True, metavar="STUDY", help=about)
    about = (
        "the first study with a change: NAME=--KEY VALUE ..., keys of the study; may be given several times"
    )
    parser.add_argument("--row", action="append", default=[], metavar="ROW", help=about)
    about = "share of the first one's lead by which another may fall behind (default: 0.1)"
    parser.add_argument("--margin", type=margin_type, default=0.1, metavar="M", help=about)
    about = "also write the table to this file, as Markdown"
    parser.add_argument("--markdown", type=Path, action=NewFile, metavar="FILE", help=about)
    add_json(parser)
    args = parser.parse_args()
    studies = [load_study(where) for where in args.study]
    for study in studies:
        check_trained(study)
    changed = plan_rows(studies[0], args.row)
    studies += changed
    check_names(studies)
    if len(studies) < 2:
        raise UserError(
            "--study", "one study", "give another one, `arms` in it, or a change of it with --row"
        )
    train_rows(studies[0], changed)
    found = [read_study(study) for study in studies]
    rows = compare(found, args.margin)
    table = [cells(row, gate_of(study)) for row, study in zip(rows, studies, strict=True)]
    shown = Table(*TITLES.values(), title="bits per byte, each with its bounds at alpha")
    for line in table:
        shown.add_row(*(line[name] for name in TITLES))
    new_console().print(shown)
    remarks = notes(rows, args.margin, found[0][1].alpha)
    made = stamp_line("compared")
    print("\n".join([*remarks, made]))
    absorbed = sum(row.result == ABSORBED for row in rows)
    print(f"{absorbed} of {len(rows)} absorbed")
    if args.markdown is not None:
        text = markdown_table([*TITLES.values()], [[line[name] for name in TITLES] for line in table], made)
        write_text(args.markdown, f"{text}\n")
    result = ComparisonFile(margin=args.margin, rows=rows, notes=remarks)
    write_json(beside(studies[0]) / "compare.json", result)
    write_json(args.json, result)
    return EXIT_PASS


if __name__ == "__main__":
    main()
