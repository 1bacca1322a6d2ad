"""From gate.json to a table that can be read: in the terminal, as table.md and as one HTML file.

    python -m eval.report --study runs/default

The report decides nothing: every figure and verdict is the gate's.
"""

import argparse
import shutil
import sys
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from eval import tables
from eval.artifacts import file_sha256, write_text
from eval.errors import UserError, entry
from eval.study import Study, study_from_command
from eval.verdict import GateFile

WIDTH = 160  # columns of the table where nobody can tell, e.g. in a log


def read_gate(run: Path, mend: str) -> GateFile:
    """gate.json of a run folder.

    Raises:
        UserError: it is missing or is not what the gate of this version writes.
    """
    path = run / "gate.json"
    if not path.is_file():
        raise UserError("gate.json", f"missing in {run}", mend)
    try:
        return GateFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "top level"
        raise UserError(f"{path}: {place}", first["msg"], mend) from error


def refuse_stale(gate: GateFile, study: Study, run: Path, mend: str) -> None:
    """Raises UserError if the gate judged another study, or at the first record that differs by now."""
    read = {"study.yaml": gate.provenance.config, **gate.provenance.records}
    files = (run / "records").rglob("*.json")
    found = {"study.yaml": study.hash(), **{p.relative_to(run).as_posix(): file_sha256(p) for p in files}}
    for name in sorted({*read, *found}):
        if read.get(name) != found.get(name):
            was, now = (held.get(name, "absent")[:12] for held in (read, found))
            raise UserError("gate.json is stale", f"{name} was {was}, is {now}", mend)


def show(gate: GateFile) -> None:
    """Prints the verdict and the budget table."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(width=width, highlight=False)
    console.print(tables.terminal(gate))
    for v in gate.variants:
        console.print(Text(f"{v.recipe} on {v.target}: {v.reason}"))
    for line in tables.unmeasured(gate):
        console.print(Text(f"to measure {line}"))
    console.print(Text(f"* recommended ({tables.recommended(gate)}). {tables.FOOTNOTE}", style="dim"))
    console.print(Text(gate.verdict, style=tables.STYLES[gate.verdict]), Text(gate.reason))


@entry
def main() -> None:
    study, known = study_from_command(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    run = Path(known.study) if Path(known.study).is_dir() else study.folder
    mend = f"run `python -m eval.gate --study {known.study}` first"
    gate = read_gate(run, mend)
    refuse_stale(gate, study, run, mend)
    from eval.page import page  # matplotlib: what is refused should be refused fast

    html = page(gate, run, (run / "study.yaml").read_text(encoding="utf-8"))
    write_text(run / "table.md", tables.markdown(gate))
    write_text(run / "report.html", html)
    show(gate)
    print(run / "report.html", flush=True)


if __name__ == "__main__":
    main()
