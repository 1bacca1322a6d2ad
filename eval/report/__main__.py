"""From gate.json to a table that can be read: in the terminal, as table.md, table.csv and one HTML file.

    python -m eval.report --study runs/default

The report decides nothing: every figure and verdict is the gate's.
"""

from pathlib import Path

from eval.core.artifacts import file_sha256, write_text
from eval.core.commands import new_console, new_parser, study_from_command
from eval.core.errors import UserError, entry
from eval.core.gate_file import GateFile, read_gate
from eval.core.sections.classification import in_words
from eval.core.study import Study
from eval.report.budget_table import csv_text
from eval.report.format import data_lines
from eval.report.markdown import render_markdown
from eval.report.terminal import print_report


def refuse_stale(gate: GateFile, study: Study, run: Path, fix: str) -> None:
    """Raises UserError if the gate judged another study, or at the first record that differs by now."""
    judged = {"study.yaml": gate.provenance.config, **gate.provenance.records}
    files = (run / "records").rglob("*.json")
    current = {"study.yaml": study.hash(), **{p.relative_to(run).as_posix(): file_sha256(p) for p in files}}
    for name in sorted({*judged, *current}):
        if judged.get(name) != current.get(name):
            was, now = (hashes.get(name, "absent")[:12] for hashes in (judged, current))
            opened = name.startswith("records/test/") and name not in judged
            cause = "the test documents were opened after it" if opened else "it is older than what it judged"
            raise UserError(f"gate.json of {run}", f"{cause}: {name} was {was}, is {now}", fix)


def render_reports(run: Path, gate: GateFile) -> dict[str, str]:
    """File -> text of every report of gate.json; the same gate.json gives the same bytes."""
    from eval.report.html import render_page  # matplotlib: what is refused should be refused fast

    texts = {
        "table.md": render_markdown(gate, data_lines(run, gate)),
        "table.csv": csv_text(gate),
        "report.html": render_page(gate, run, (run / "study.yaml").read_text(encoding="utf-8")),
    }
    return {name: in_words(text, gate.task) for name, text in texts.items()}


@entry
def main() -> None:
    study, _ = study_from_command(new_parser(__doc__))
    run = study.folder
    gate = read_gate(run)
    refuse_stale(gate, study, run, f"run `absorb gate --study {run}` first")
    for name, text in render_reports(run, gate).items():
        write_text(run / name, text)
    print_report(gate, new_console(), data_lines(run, gate))
    print(run / "report.html", flush=True)


if __name__ == "__main__":
    main()
