"""The verdict of a study: does the method's gain persist in a variant that its targets can afford?

`python -m eval.gate --study runs/NAME [--budget NAME]` reads the records of a run and writes `gate.json`.
Exit codes: 0 pass, 1 fail, 2 inconclusive, 3 error.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

# One thread adds up in one order: the same records give the same bytes on any number of cores. Before numpy.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from rich.console import Console
from rich.text import Text

from eval.core.commands import STYLES, level_text, new_parser, stamp_line, study_from_command, write_json
from eval.core.errors import EXITS, entry
from eval.core.gate_file import GateFile, OnTestSet, Variant
from eval.core.jobs import lock_folder
from eval.core.plan import budget_of_run
from eval.core.sections.classification import BITS, in_words
from eval.gate.decision import evaluate_gate, read_before
from eval.gate.evidence import collect_evidence
from eval.gate.history import write_runs
from eval.stats.crossed import INCONCLUSIVE


def variant_line(row: Variant, reason: str) -> Text:
    """One line per variant: what, where, how it went and why."""
    mark = " *" if row.recommended else ""
    return Text.assemble(
        f"{row.recipe}{mark} on {row.target}: ",
        (row.verdict, STYLES[row.verdict]),
        f" - {reason}",
        f"; run {row.how}" if row.how and row.verdict == INCONCLUSIVE else "",
    )


def opening_line(look: OnTestSet, level: float) -> Text:
    """How often the test documents were opened, and what the last look said."""
    share, when = look.kept_share, "" if look.current else ", of artifacts or a budget of before"
    start = f"test documents, opening {look.openings} by {look.by} for {look.recipe}{when}: "
    if look.verdict is None:
        return Text(f"{start}not finished; run the same command of eval.gate.test_set again")
    keeps = "the share of the gain retained is undefined"
    if share is not None and share.point is not None:
        keeps = f"keeps {share.point:.2f} ({level_text(level)} interval {share.low:.2f} to {share.high:.2f})"
    return Text.assemble(start, (look.verdict, STYLES[look.verdict]), f", {keeps}")


def verdict_lines(result: GateFile) -> Iterator[Text]:
    """Every variant, what is odd, what was said of the test documents, and the verdict."""
    words = partial(in_words, task=result.task, words=BITS)
    yield from (variant_line(row, words(row.reason)) for row in result.variants)
    yield from (Text.assemble(("ANOMALOUS", "yellow"), f": {words(one)}") for one in result.anomalies)
    yield from (Text(f"note: {words(note)}") for note in result.notes)
    if result.test_set:
        yield opening_line(result.test_set, result.level)
    yield Text.assemble((result.verdict, STYLES[result.verdict]), f": {words(result.reason)}")


def print_verdict(console: Console, result: GateFile, path: Path) -> None:
    for line in verdict_lines(result):
        console.print(line, soft_wrap=True)
    made = stamp_line("judged", result.runs[-1].time, result.provenance.tool)
    console.print(Text(f"{made}, budget {result.budget['name']}"), soft_wrap=True)
    legend = "* recommended; " if any(row.recommended for row in result.variants) else ""
    console.print(Text(f"{legend}the whole verdict lies in {path}"), soft_wrap=True)


@entry
def main() -> int:
    parser = new_parser(__doc__)
    parser.add_argument("--budget", help="another budget than the run's fixed one: a name or a YAML file")
    study, args = study_from_command(parser, measures=True)
    folder = study.folder
    budget = budget_of_run(study, args.budget)
    path = folder / "gate.json"
    with lock_folder(folder):
        result = evaluate_gate(collect_evidence(folder, study, budget), budget, read_before(folder))
        write_runs(folder, result.runs)
        write_json(path, result)
    print_verdict(Console(), result, path)
    write_json(args.json, result)
    return EXITS[result.verdict]


if __name__ == "__main__":
    main()
