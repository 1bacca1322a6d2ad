"""What a sign-off says: an in-toto statement about one variant on one target, and how to read it.

The subjects are the manifests of the signed artifacts, each of which lists the hash of every file beside it.
The predicate says who signed what, when, and on which evidence. `verify` checks it from the bytes.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval.core.artifacts import file_sha256
from eval.core.errors import UserError, expected_text
from eval.signoff.keys import AGAIN, envelope, from_raw, signed_by, wrapped
from eval.stats.crossed import Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://absorb.example/signoff/v1"  # an identifier; docs/release.md describes its fields
FOLDER = "signoff"
BEGIN, END = "<!-- sign-offs -->", "<!-- end of sign-offs -->"
SHOWN = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
# What the page may hold between these marks, tag by tag as its template writes them: readers of HTML differ
# in what they make of anything else, and a browser must not see more than whoever checks it.
TAG = re.compile(
    r'<(section) class="signed" aria-labelledby="h-signed">|<(h2) id="h-signed">|<(ul|strong|code)>'
    r'|<(li) class="(?:broken|waived|whole)">|<(time)(?: class="until")? datetime="[^"<>&]*">'
)


class ForwardCompatible(BaseModel):
    """Fields that a later version may add are ignored, as the in-toto specification asks."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)


class Waiver(ForwardCompatible):
    """Why something that did not pass may be shipped all the same, and until which day (UTC, inclusive)."""

    reason: str = Field(min_length=1)
    expires: date


class Policy(ForwardCompatible):
    name: str  # as the study or the command names it
    sha256: str  # of the file
    hash: str  # of its values, as in gate.json


class Digest(ForwardCompatible):
    sha256: str


class Subject(ForwardCompatible):
    name: str  # path below the run folder
    digest: Digest


class Predicate(ForwardCompatible):
    """Who signed what, and the hash of everything that it rests on."""

    by: str = Field(min_length=1)
    time: str  # ISO 8601, UTC
    public_key: str  # 32 bytes in hexadecimal
    study: str
    config: str  # hash of the study
    recipe: str
    target: str
    verdict: Verdict
    reason: str
    recommended: bool
    waiver: Waiver | None
    policy: Policy
    test_set: dict[str, Any] | None  # the opening of the test documents, as in gate.json
    data: str  # hash of the data artifact
    artifacts: dict[str, str]  # arm/s<seed>/recipe -> hash: what is signed, its control, parents and fallback
    files: dict[str, str]  # path below the run folder -> sha256; see `signed_digest`


class Statement(ForwardCompatible):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    subject: list[Subject]
    predicate_type: Literal["https://absorb.example/signoff/v1"] = Field(alias="predicateType")
    predicate: Predicate


@dataclass(frozen=True)
class SignOff:
    """A sign-off as a reader may show it. `problem` is None where it may be trusted as far as was looked."""

    path: Path
    predicate: Predicate | None  # None where the file cannot be read
    key: str  # id of the key that signed, empty where unknown
    problem: str | None


def sign_statement(statement: Statement, signer: "CryptoSigner") -> str:
    """The text of the sign-off."""
    return wrapped(statement.model_dump_json(by_alias=True).encode(), signer)


def read_statement(path: Path, trusted: "SSlibKey | None" = None) -> tuple[Statement, "SSlibKey"]:
    """The statement of a sign-off whose signature holds, and the key that holds it.

    Without a `trusted` key the one that the statement names is used: the bytes are then whole, and who
    signed is unknown.

    Raises:
        UserError: the file is no sign-off, was changed, or was signed by another key than the trusted one.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"sign-off {path}", "not UTF-8", AGAIN) from error
    outside = envelope(text, path)
    try:
        statement = Statement.model_validate_json(outside.payload)
        named = from_raw(statement.predicate.public_key)
    except (ValidationError, ValueError) as error:
        reason = expected_text(error.errors()[0]) if isinstance(error, ValidationError) else error
        raise UserError(f"sign-off {path}", f"no statement of this kind ({reason})", AGAIN) from error
    if not signed_by(outside, named):
        raise UserError(f"sign-off {path}", "the signature does not fit the bytes: they were changed", AGAIN)
    if trusted and trusted.keyid != named.keyid:
        reason = f"signed with the key {named.keyid[:12]}, which is not the trusted {trusted.keyid[:12]}"
        raise UserError(f"sign-off {path}", reason, "ask the signer for the public key, or another signer")
    return statement, named


def expired(waiver: Waiver | None, today: date) -> str | None:
    """What to say where a waiver has run out."""
    return f"the waiver expired on {waiver.expires}" if waiver and today > waiver.expires else None


def list_signoffs(run: Path, today: date | None = None) -> list[SignOff]:
    """Every sign-off of a run, for those who show them, in the order of their files.

    The signature, the date of a waiver and the bytes of gate.json are looked at, and nothing else:
    `python -m eval.signoff --verify` checks the rest. What is shown must stand between the lines `BEGIN`
    and `END`, because a report is signed without its sign-offs.
    """
    list_signoffs, today = [], today or datetime.now(UTC).date()
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            statement, key = read_statement(path)
        except UserError as error:
            list_signoffs.append(SignOff(path, None, "", str(error.problem)))
            continue
        predicate = statement.predicate
        problem = expired(predicate.waiver, today)
        gate = run / "gate.json"
        if not gate.is_file() or file_sha256(gate) != predicate.files.get("gate.json"):
            problem = "gate.json is not the one that was signed"
        list_signoffs.append(SignOff(path, predicate, key.keyid, problem))
    return list_signoffs


def signed_digest(path: Path) -> str:
    """SHA-256 of a file; of a report or a table, without the part that shows the sign-offs.

    Raises:
        UserError: that part holds more than text and tables, and could hide what was signed.
    """
    if path.suffix not in (".html", ".md"):
        return file_sha256(path)
    text = path.read_bytes().decode(errors="surrogateescape")
    parts = SHOWN.findall(text)
    bad = "a second part with sign-offs" if len(parts) > 1 else _beyond_text("".join(parts))
    if bad:
        raise UserError(f"report {path}", f"it holds {bad}", "make the report again")
    return hashlib.sha256(SHOWN.sub("", text).encode(errors="surrogateescape")).hexdigest()


def _beyond_text(part: str) -> str | None:
    """The first tag of the part with the sign-offs that its template does not write, or does not end."""
    opened: list[str] = []
    for tag in re.findall("<[^>]*>?", part.removeprefix(BEGIN).removesuffix(END)):
        if match := TAG.fullmatch(tag):
            opened.append(next(name for name in match.groups() if name))
        elif opened and tag == f"</{opened[-1]}>":
            opened.pop()
        else:
            return f"{tag[:40]} among its sign-offs"
    return f"<{opened[-1]}> among its sign-offs, which does not end" if opened else None
