"""Looks at the test documents, and verdicts: counted, never deleted, shown wherever a verdict is shown.

Whoever picks the best of several variants on the validation documents picks some luck with it, and the pick's
own estimate is too good (the winner's curse). Nothing is chosen on the test documents, so the first look at
them is free of that; a second one is not, if what the first said was of any consequence. So with budgets.

Each look and each verdict holds the SHA-256 of the one before it. What is wiped is noticed by the next link;
that the last links, or all of them, were wiped can only be seen against a copy that lies elsewhere.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from eval.core.artifacts import digest, file_sha256, text_sha256, write_text
from eval.core.checks import STUDENT
from eval.core.errors import UserError, first_error
from eval.core.gate_file import Extent, GateFile, GateRun, Look, OnTestSet, Opening
from eval.core.plan import RUNS, Plan
from eval.core.records import PLAIN

BACK = "put it back: openings and verdicts are counted for ever"
M = TypeVar("M", bound=BaseModel)


def opening_path(run: Path, number: int) -> Path:
    return run / "records" / "test" / f"opening-{number}.json"


def write_opening(run: Path, opening: Opening) -> Path:
    path = opening_path(run, opening.number)
    write_text(path, opening.model_dump_json(indent=1) + "\n")
    return path


def link_of(run: Path, number: int) -> str | None:
    """SHA-256 of the opening before the one of this number; None for the first."""
    return file_sha256(opening_path(run, number - 1)) if number > 1 else None


def read_openings(run: Path) -> list[Opening]:
    """Every opening of a run, the first one first.

    Raises:
        UserError: one is damaged, is gone, or is not the one that the next one was linked to.
    """
    openings: list[Opening] = []
    count = len(list((run / "records" / "test").glob("opening-*.json")))
    for number in range(1, count + 1):
        path = opening_path(run, number)
        if not path.is_file():
            raise UserError(f"opening {path}", "is gone", BACK)
        opening = _parsed(Opening, path.read_bytes(), f"opening {path}")
        if opening.number != number:
            problem = f"it is opening {opening.number}: one before it was wiped"
            raise UserError(f"opening {path}", problem, BACK)
        if opening.previous != (link := link_of(run, number)):
            problem = f"is linked to {_short(opening.previous)}, opening {number - 1} is {_short(link)}"
            raise UserError(f"opening {path}", problem, BACK)
        openings.append(opening)
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
        raise UserError(f"openings of {run}", problem, BACK)
    return openings


def _parsed(model: type[M], text: bytes, thing: str) -> M:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise first_error(thing, error, "put the file back as it was") from error


def _short(link: str | None) -> str:
    return link[:12] if link else "none"


def _line(run: GateRun) -> str:
    return run.model_dump_json()


def read_runs(
    run: Path, before: GateFile | None, plan: Plan | None, openings: list[Opening]
) -> list[GateRun]:
    """Every verdict that the gate gave in a run, the first one first.

    Args:
        before: gate.json as it lies there.

    Raises:
        UserError: a verdict, an opening that one has seen, or the plan that one was given by, is gone or was
            changed.
    """
    path, runs = run / RUNS, list[GateRun]()
    lines = path.read_bytes().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        one = _parsed(GateRun, line, f"{path}: line {number}")
        link = text_sha256(_line(runs[-1])) if runs else None
        if (one.number, one.previous, _line(one).encode()) != (number, link, line):
            problem = f"is verdict {one.number}, linked to {_short(one.previous)}, not {_short(link)}"
            raise UserError(f"{path}: line {number}", problem, BACK)
        runs.append(one)
    known = {"" if plan is None else plan.hash, *(one.hash for one in (plan.earlier if plan else []))}
    for one in runs:
        if one.plan and one.plan not in known:
            was = f"verdict {one.number} in {path.name} was by {one.plan[:12]}"
            problem = f"is {_short(plan.hash if plan else None)}, {was}"
            raise UserError(
                f"plan {run / 'plan.json'}", problem, "put back what changed: a plan is fixed once"
            )
        if one.openings > len(openings):
            gone = opening_path(run, len(openings) + 1)
            raise UserError(
                f"opening {gone}", f"is gone; verdict {one.number} in {path.name} has seen it", BACK
            )
        if one.opening and one.opening != (now := file_sha256(opening_path(run, one.openings))):
            problem = f"was {one.opening[:12]} at verdict {one.number}, is {now[:12]}"
            raise UserError(f"opening {opening_path(run, one.openings)}", problem, BACK)
    earlier = before.runs if before else []
    if earlier != runs[: len(earlier)]:
        problem = f"gate.json lists {len(earlier)} verdict(s), it holds {len(runs)} or others"
        raise UserError(f"verdicts {path}", problem, BACK)
    return runs


def add_run(
    runs: list[GateRun], gate: GateFile, extent: Extent, run: Path, openings: list[Opening]
) -> list[GateRun]:
    """The verdicts with that of `gate`, unless it is the last one again: same evidence, same budget."""
    evidence = digest([gate.provenance.records, gate.provenance.artifacts, gate.recommended])
    seen = openings and openings[-1].verdict is not None
    new = GateRun(
        number=len(runs) + 1,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=gate.fixed.hash if gate.fixed else "",
        budget=gate.budget["name"],
        budget_hash=gate.budget["hash"],
        evidence=evidence,
        extent=extent,
        openings=len(openings),
        opening=file_sha256(opening_path(run, len(openings))) if seen else None,
        verdict=gate.verdict,
        previous=text_sha256(_line(runs[-1])) if runs else None,
    )
    place = {"number", "time", "previous", "extent"}  # `evidence` decides the extent
    if runs and runs[-1].model_dump(exclude=place) == new.model_dump(exclude=place):
        return runs
    return [*runs, new]


def write_runs(run: Path, runs: list[GateRun]) -> None:
    write_text(run / RUNS, "".join(_line(one) + "\n" for one in runs))


def recipes_seen(opening: Opening, artifacts: dict[str, str]) -> list[str]:
    """Recipes of which a student has the bytes of one that an opening looked at, under whatever name."""
    models = {tuple(name.split("/", 2)): sha for name, sha in artifacts.items()}
    looked = {
        sha for name, sha in opening.artifacts.items() if name.split("/", 2)[::2] == [STUDENT, opening.recipe]
    }
    return list(dict.fromkeys(r for (arm, _, r), sha in models.items() if arm == STUDENT and sha in looked))


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
                seen=recipes_seen(opening, artifacts),
                **opening.model_dump(include={"number", "time", "by", "reason", "recipe", "verdict"}),
            )
            for opening in openings
        ],
        **last.model_dump(
            include={"time", "by", "recipe", "target", "documents", "verdict", "parts"}
            | {"teacher_gain", "kept_share", "guard_share", "slices"}
        ),
    )
