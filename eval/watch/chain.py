"""The log of a rollout: a signed line a step, each with the hash of the line before; and the state.

A line is a DSSE envelope around an in-toto statement about the release's manifest; its predicate says who did
what, why, and by which figures. What a loader obeys, `rollout.json`, repeats the last line's state.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field, ValidationError

from eval.core.artifacts import file_sha256, text_sha256, write_text
from eval.core.config import OneLine, Stored
from eval.core.errors import UserError, expected_text
from eval.signoff.keys import Trusted, envelope, from_text, signer_name, wrapped
from eval.signoff.statement import TYPE
from eval.watch.decision import Finding, Sums
from eval.watch.routing import Arm, Plan

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

LOG, STATE, KEYS = "log.jsonl", "rollout.json", "keys"
PREDICATE: Final = "https://absorb.example/rollout/v1"  # an identifier; docs/rollout.md describes its fields
BACK = "put the file back as it was: steps are never taken away"
Status = Literal["running", "complete", "rolled back"]


class State(Stored):
    """What routers and loaders obey."""

    schema_version: Literal[1] = 1
    release: str  # SHA-256 of the release's manifest.json
    contract: str  # its name, and who answers for it
    owner: OneLine
    target: str
    status: Status
    stage: int  # of the plan, from 1 on; the last one when complete
    step: int
    time: str  # ISO 8601, UTC
    reason: OneLine
    plan: Plan


class Step(Stored):
    """One line of the log."""

    number: int  # from 1 on
    previous: str | None  # SHA-256 of the line before
    time: str
    by: OneLine
    public_key: str
    decision: Literal["START", "PROMOTE", "HOLD", "ROLL BACK"]
    reason: OneLine
    by_hand: bool = False  # somebody decided, not the figures
    stage: int  # in which the requests were answered
    requests: str | None = None  # SHA-256 of the log of requests
    keys: str | None = None  # SHA-256 of the file of hashed keys that were new in it
    ignored: dict[str, int] = Field(default_factory=dict)  # why a request does not count -> how many
    sums: dict[Arm, Sums] | None = None
    findings: list[Finding] = Field(default_factory=list)
    state: State  # after it


def log_path(folder: Path) -> Path:
    return folder / LOG


def keys_path(folder: Path, number: int) -> Path:
    return folder / KEYS / f"{number:04d}.txt"


def require_log(folder: Path) -> None:
    """Raises UserError where a folder holds no rollout."""
    if not log_path(folder).is_file():
        fix = "name a folder that `absorb rollout start` made"
        raise UserError(f"rollout {folder}", f"no {LOG}", fix)


def _lines(folder: Path) -> list[str]:
    require_log(folder)
    lines = log_path(folder).read_bytes().splitlines()  # of bytes: a text may hold U+2028, which ends no line
    return [line.decode(errors="replace") for line in lines]


def last_hash(folder: Path) -> str | None:
    lines = _lines(folder) if log_path(folder).is_file() else []
    return text_sha256(lines[-1]) if lines else None


def read_steps(folder: Path, trusted: Trusted | None) -> list[Step]:
    """Every step of a rollout, the first one first, whose signatures and links hold.

    Without `trusted` keys the bytes are whole, and who signed is unknown.

    Raises:
        UserError: a line was changed, is gone, or was signed by a key that is not trusted.
    """
    steps: list[Step] = []
    lines = _lines(folder)
    for number, line in enumerate(lines, start=1):
        where = f"{log_path(folder)}: line {number}"
        step = _read_line(line, where, trusted)
        link = text_sha256(lines[number - 2]) if number > 1 else None
        if step.number != number or step.previous != link:
            raise UserError(where, "is not linked to the line before it: one was wiped or changed", BACK)
        steps.append(step)
    if not steps:
        raise UserError(f"rollout {folder}", f"{LOG} is empty", BACK)
    return steps


def _read_line(line: str, where: str, trusted: Trusted | None) -> Step:
    outside = envelope(line, where)
    try:
        step = Step.model_validate(json.loads(outside.payload)["predicate"])
        key = from_text(step.public_key)
    except ValidationError as error:
        raise UserError(where, f"no step of a rollout ({expected_text(error.errors()[0])})", BACK) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(where, f"no step of a rollout ({error})", BACK) from error
    signer_name(outside, key, trusted, where, BACK)
    return step


def key_ids(steps: list[Step]) -> list[str]:
    """The begin of the id of each key that has signed a step, in the order in which they came."""
    return list(dict.fromkeys(from_text(one.public_key).keyid[:12] for one in steps))


def keys_to_know(ids: list[str]) -> str:
    """What servers and loaders must be given."""
    keys = f"key {ids[0]}" if len(ids) == 1 else f"keys {', '.join(ids)}"
    return (
        f"signed with the {keys}: servers and loaders must know each (--rollout-key), or the release is off"
    )


def append_step(folder: Path, step: Step, signer: "Signer") -> None:
    """Signs a step, adds its line, and writes the state."""
    subject = [{"name": "manifest.json", "digest": {"sha256": step.state.release}}]
    statement = {"_type": TYPE, "subject": subject, "predicateType": PREDICATE}
    payload = json.dumps({**statement, "predicate": step.model_dump(mode="json")}).encode()
    lines = _lines(folder) if step.number > 1 else []
    write_text(log_path(folder), "".join(f"{line}\n" for line in [*lines, wrapped(payload, signer)]))
    write_state(folder, step.state)


def state_text(folder: Path, state: State) -> str:
    """The text of `rollout.json`: the state, and the hash of the line that says the same."""
    return json.dumps({**state.model_dump(mode="json"), "log": last_hash(folder)}, indent=1) + "\n"


def write_state(folder: Path, state: State) -> None:
    write_text(folder / STATE, state_text(folder, state))


def has_state(folder: Path, state: State) -> bool:
    """Is `rollout.json` what the last line says? It is not where a step was cut off between the two."""
    path = folder / STATE
    return path.is_file() and path.read_bytes() == state_text(folder, state).encode()


def looks_of(steps: list[Step], stage: int) -> dict[Arm, list[Sums]]:
    """The looks of one stage so far."""
    sums = [step.sums for step in steps if step.sums is not None and step.stage == stage]
    return {"release": [one["release"] for one in sums], "fallback": [one["fallback"] for one in sums]}


def known_keys(folder: Path, steps: list[Step], stage: int) -> set[str]:
    """Hashes of the keys that were counted in a stage.

    Raises:
        UserError: a file of them is gone or was changed.
    """
    known: set[str] = set()
    for step in steps:
        if step.keys is not None and step.stage == stage:
            path = keys_path(folder, step.number)
            if not path.is_file() or file_sha256(path) != step.keys:
                raise UserError(f"keys {path}", f"not those of step {step.number}", BACK)
            known |= set(path.read_text(encoding="utf-8").split())
    return known
