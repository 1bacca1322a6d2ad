"""Looks at the test documents: counted, never deleted, and shown wherever the gate's verdict is shown.

Whoever picks the best of several variants on the validation documents picks some luck with it, and the pick's
own estimate is too good (the winner's curse). Nothing is chosen on the test documents, so the first look at
them is free of that; a second one is not, if what the first said was of any consequence.
"""

from pathlib import Path

from pydantic import ValidationError

from eval.core.artifacts import write_text
from eval.core.errors import UserError, expected_text
from eval.core.gate_file import Look, OnTestSet, Opening
from eval.core.records import PLAIN


def opening_path(run: Path, number: int) -> Path:
    return run / "records" / "test" / f"opening-{number}.json"


def write_opening(run: Path, opening: Opening) -> Path:
    path = opening_path(run, opening.number)
    write_text(path, opening.model_dump_json(indent=1) + "\n")
    return path


def read_openings(run: Path) -> list[Opening]:
    """Every opening of a run, the first one first.

    Raises:
        UserError: one is damaged, or is gone: openings are never deleted.
    """
    openings: list[Opening] = []
    count = len(list((run / "records" / "test").glob("opening-*.json")))
    for number in range(1, count + 1):
        path = opening_path(run, number)
        if not path.is_file():
            raise UserError(f"opening {path}", "is gone", "put it back: openings are counted for ever")
        try:
            openings.append(Opening.model_validate_json(path.read_bytes()))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "top level"
            raise UserError(
                f"opening {path}: {place}", expected_text(first), "put the file back as it was"
            ) from error
    scored = {
        path.parent.name
        for path in (run / "records" / "test").glob("*/*.json")
        if not path.name.startswith(("T0-", "T1-"))  # those are scored while they are trained
    }
    known = {
        name for opening in openings for name in (opening.recipe, PLAIN)
    }  # the student is scored at every look
    if lost := sorted(scored - known):
        problem = f"scored without an opening: {', '.join(lost)}"
        raise UserError(f"openings of {run}", problem, "put the opening back: they are counted for ever")
    return openings


def summarize_openings(openings: list[Opening], artifacts: dict[str, str], budget: str) -> OnTestSet | None:
    """What gate.json says of the openings; the figures are those of the last one.

    Args:
        artifacts, budget: hashes of what the gate judges; they show whether the last look was at the same.
    """
    if not openings:
        return None
    last = openings[-1]
    return OnTestSet(
        openings=len(openings),
        current=last.artifacts.items() <= artifacts.items() and last.budget == budget,
        history=[
            Look(
                same=opening.artifacts.items() <= artifacts.items(),
                **opening.model_dump(include={"number", "time", "by", "reason", "recipe", "verdict"}),
            )
            for opening in openings
        ],
        **last.model_dump(
            include={"time", "by", "recipe", "target", "documents", "verdict", "parts"}
            | {"teacher_gain", "kept_share", "guard_share"}
        ),
    )
