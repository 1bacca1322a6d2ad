"""What a sign-off says: in-toto statements about one variant on one target, and how to read them.

The subjects are the manifests of the signed artifacts, each of which lists the hash of every file beside it.
The predicate says who signed what, when, and on which figures. A file holds a bundle: a line for each
envelope, two for each signature, of which the second says the same in in-toto's own words. Lines are added,
never replaced.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.core.artifacts import commit_text, file_sha256
from eval.core.config import FileName, OneLine
from eval.core.errors import UserError, expected_text
from eval.core.gate_file import GateRun
from eval.signoff.keys import AGAIN, Trusted, envelope, from_text, signed_by, signer_name, wrapped
from eval.stats.crossed import GENERATOR, PASS, Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import Signer

TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://absorb.example/signoff/v2"  # an identifier; docs/release.md describes its fields
TEST_RESULT: Final = "https://in-toto.io/attestation/test-result/v0.1"
FOLDER = "signoff"


class ForwardCompatible(BaseModel):
    """Fields that a later version may add are ignored, as the in-toto specification asks."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Waiver(ForwardCompatible):
    """Why something that did not pass may be shipped all the same, and until which day (UTC, inclusive)."""

    reason: OneLine = Field(min_length=1)
    expires: date


class Policy(ForwardCompatible):
    """By what was judged, and what it asks of a waiver."""

    name: OneLine  # of the budget
    hash: str  # of its values, as in gate.json
    fixed: bool  # it is the one that was fixed when training began
    plan: str  # hash of what was fixed then; empty where nothing was
    signatures: int  # that a waiver needs
    days: int  # that a waiver may last


class Digest(ForwardCompatible):
    sha256: str


class Subject(ForwardCompatible):
    name: str  # path below the run folder
    digest: Digest


class Versions(ForwardCompatible):
    """What computed the figures that are signed."""

    project: str  # version
    commit: str | None  # of the checkout, `-dirty` where files were changed; null where there is none
    python: str
    numpy: str
    scipy: str
    generator: str  # of random numbers


class Predicate(ForwardCompatible):
    """Who signed what, and every figure and hash that it rests on."""

    by: OneLine = Field(min_length=1)
    time: str  # ISO 8601, UTC
    public_key: str  # 32 bytes in hexadecimal (Ed25519), else PEM
    study: str
    config: str  # hash of the study
    recipe: FileName
    target: FileName
    verdict: Verdict
    reason: OneLine
    recommended: bool
    waiver: Waiver | None
    policy: Policy
    data: str  # hash of the data artifact
    artifacts: dict[str, str]  # arm/s<seed>/recipe -> hash: what is signed, its control, parents and fallback
    files: dict[str, str]  # path below the run folder -> sha256
    figures: dict[str, Any]  # of gate.json, sentences left out
    judged: GateRun  # the verdict of the gate that is signed
    versions: Versions
    previous: str | None  # sha256 of all lines before; null for the first


class Statement(ForwardCompatible):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Subject]
    predicate_type: Literal["https://absorb.example/signoff/v2"] = Field(alias="predicateType")
    predicate: Predicate


@dataclass(frozen=True)
class Signed:
    """A statement whose signature fits its bytes."""

    statement: Statement
    key: str  # id of the key that signed
    holder: str  # name of the trusted key's holder; empty where no key was named as trusted
    line: int

    @property
    def predicate(self) -> Predicate:
        return self.statement.predicate


def signoff_path(folder: Path, recipe: str, target: str) -> Path:
    """Where the sign-offs of a variant lie, in a run folder or a release: no name of either has an @."""
    return folder / FOLDER / f"{recipe}@{target}.intoto.jsonl"


@cache
def current_versions() -> Versions:
    """The versions at work here."""
    return Versions(
        project=metadata.version("absorb"),
        commit=commit_text(40) or None,
        python=platform.python_version(),
        numpy=metadata.version("numpy"),
        scipy=metadata.version("scipy"),
        generator=GENERATOR,
    )


def result_payload(statement: Statement) -> bytes:
    """The same as in-toto's test-result, which has a list of tests and no figures."""
    predicate, row = statement.predicate, statement.predicate.figures["row"]
    parts: dict[str, list[str]] = {"PASS": [], "INCONCLUSIVE": [], "FAIL": []}
    for part in row["parts"]:
        parts[part["verdict"]].append(part["name"])
    word = {PASS: "PASSED", "INCONCLUSIVE": "WARNED", "FAIL": "FAILED"}[predicate.verdict]
    budget = {"name": predicate.policy.name, "digest": {"sha256": predicate.policy.hash}}
    result = {
        "result": word,
        "configuration": [budget],
        "passedTests": parts["PASS"],
        "warnedTests": parts["INCONCLUSIVE"],
        "failedTests": parts["FAIL"],
    }
    whole: dict[str, Any] = {
        "_type": TYPE,
        "subject": [subject.model_dump() for subject in statement.subject],
    }
    return json.dumps({**whole, "predicateType": TEST_RESULT, "predicate": result}).encode()


def sign_statement(statement: Statement, signer: "Signer") -> str:
    """The two lines of a signature."""
    payloads = statement.model_dump_json(by_alias=True).encode(), result_payload(statement)
    return "".join(wrapped(payload, signer) + "\n" for payload in payloads)


def bundle_hash(path: Path) -> str | None:
    """What the next signature is linked to; None where there is none yet."""
    return file_sha256(path) if path.is_file() else None


def read_bundle(path: Path, trusted: Trusted | None = None) -> list[Signed]:
    """Every statement of a bundle, in its order, whose signatures and links hold.

    Without `trusted` keys the one that a statement names is used: the bytes are then whole, and who signed is
    unknown.

    Raises:
        UserError: the file is no bundle, was changed or cut, speaks of another variant than its name, or was
            signed by a key that is not trusted.
    """
    if not path.is_file():
        raise UserError(f"sign-off {path}", "is not there", AGAIN)
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"sign-off {path}", "cannot be read as UTF-8", AGAIN) from error
    lines = text.splitlines(keepends=True)
    if len(lines) % 2 or not lines or not text.endswith("\n"):
        raise UserError(f"sign-off {path}", f"{len(lines)} lines, two for each signature expected", AGAIN)
    numbered = list(enumerate(lines, start=1))
    signed = []
    for (number, line), (_, result) in list(pairwise(numbered))[::2]:
        where = f"sign-off {path}: line {number}"
        one = _read_line(line.removesuffix("\n"), where, number, trusted)
        of = one.predicate.recipe, one.predicate.target
        if path.name != signoff_path(Path(), *of).name:
            problem = f"speaks of {of[0]} on {of[1]}, whose file is {signoff_path(Path(), *of).name}"
            raise UserError(where, problem, f"delete {path.name} and sign again")
        before = "".join(lines[: number - 1]).encode()
        if one.predicate.previous != (hashlib.sha256(before).hexdigest() if before else None):
            raise UserError(where, "is not linked to the lines before it: one was wiped or changed", AGAIN)
        other = envelope(result.removesuffix("\n"), f"sign-off {path}: line {number + 1}")
        key = from_text(one.predicate.public_key)
        if not signed_by(other, key) or other.payload != result_payload(one.statement):
            raise UserError(
                f"sign-off {path}: line {number + 1}", "is not the result of the line before", AGAIN
            )
        signed.append(one)
    return signed


def _read_line(text: str, where: str, number: int, trusted: Trusted | None) -> Signed:
    outside = envelope(text, where)
    try:
        statement = Statement.model_validate_json(outside.payload)
        named = from_text(statement.predicate.public_key)
    except (ValidationError, ValueError) as error:
        reason = expected_text(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise UserError(where, f"no statement of this kind ({reason})", AGAIN) from error
    holder = signer_name(outside, named, trusted, where, AGAIN)
    return Signed(statement, named.keyid, holder, number)


def latest(signed: list[Signed]) -> list[Signed]:
    """The last statement of each key: who signs again takes back what was signed before."""
    return list({one.key: one for one in signed}.values())


def read_statement(path: Path, trusted: Trusted | None = None) -> Statement:
    """The first of the statements of a bundle that count; see `read_bundle`."""
    return latest(read_bundle(path, trusted))[0].statement


def expired(waiver: Waiver | None, today: date) -> str | None:
    """What to say where a waiver has run out."""
    return f"the waiver expired on {waiver.expires}" if waiver and today > waiver.expires else None
