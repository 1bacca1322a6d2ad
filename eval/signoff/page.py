"""Who signed what, as a page of its own: the reports are made from gate.json alone."""

from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from eval.core.artifacts import write_text
from eval.core.errors import UserError
from eval.signoff.keys import Trusted
from eval.signoff.statement import FOLDER, Signed, read_bundle

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "index.html"


@dataclass(frozen=True)
class Shown:
    """One file of sign-offs: its statements, and what speaks against them."""

    name: str
    signed: list[Signed]
    problems: list[str]


def signoff_files(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("*.intoto.jsonl"))


def read_shown(run: Path, trusted: Trusted | None) -> list[Shown]:
    """Every sign-off of a run by its bytes alone: what it rests on is not looked at."""
    every = []
    for path in signoff_files(run):
        try:
            every.append(Shown(path.name, read_bundle(path, trusted), []))
        except UserError as error:
            every.append(Shown(path.name, [], [str(error.problem)]))
    return every


def write_page(run: Path, shown: list[Shown], checked: str) -> Path:
    """The page of all sign-offs.

    Args:
        checked: what was looked at, in a sentence.
    """
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    path = run / FOLDER / PAGE
    page = templates.get_template("signoffs.html.j2").render(
        name=run.resolve().name, shown=shown, checked=checked
    )
    write_text(path, page + "\n")
    return path
