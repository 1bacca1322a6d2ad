"""What was seen of a release at every look: JSON Lines, a look a line, each with the hash of the line before.

No text is kept: of a document its hash, its size, and what the three models say of it.
"""

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError, model_validator

from eval.core.artifacts import text_sha256, write_text
from eval.core.config import Stored
from eval.core.errors import UserError, expected_text
from eval.release.contract_file import Bits
from eval.stats.drift import QUESTIONS

Array = NDArray[np.float64]
MODELS = ("release", "control", "fallback")
FRESH = "name a new file: a history is of one release, target and slice"


class Seen(Stored):
    """Columns of equal length, one entry per new document."""

    id: list[str]  # begin of the SHA-256 of the text, as far as it was read
    domain: list[str]
    group: list[str]  # documents in one are not independent; its id where it is alone
    bytes: list[int]
    tokens: list[int]
    unigram: list[float]  # bits per token under the unigram distribution of the training documents
    release: list[float]  # bits of the whole document, of each model
    control: list[float]
    fallback: list[float]

    @model_validator(mode="after")
    def check(self) -> Self:
        columns = [getattr(self, name) for name in type(self).model_fields]
        if len({len(column) for column in columns}) != 1 or not self.id:
            raise ValueError("columns of different lengths, or without an entry")
        if min(self.bytes) < 1 or min(self.tokens) < 1:
            raise ValueError("a document without a byte or a token")
        if not all(math.isfinite(x) for column in columns[5:] for x in column):
            raise ValueError("a figure that is not finite")
        return self

    @property
    def groups(self) -> list[str]:
        """The group of each document: one in another domain is another one."""
        return [f"{domain}\0{group}" for domain, group in zip(self.domain, self.group, strict=True)]


class Look(Stored):
    """One line of a history."""

    schema_version: Literal[1] = 1
    number: int  # from 1 on
    previous: str  # SHA-256 of the line before; empty at the first
    time: str  # ISO 8601, UTC
    release: str  # SHA-256 of the release's manifest.json
    contract: str  # its name
    target: str
    slice: str
    tuned: float  # documents at which the bounds are narrowest: chosen at the first look, kept ever after
    seen: Seen
    state: str  # what was said of everything so far
    reason: str

    @property
    def day(self) -> str:
        return self.time[:10]


def line_of(look: Look) -> str:
    return look.model_dump_json() + "\n"


def previous_hash(looks: list[Look]) -> str:
    return text_sha256(line_of(looks[-1])) if looks else ""


def read_history(path: Path) -> list[Look]:
    """Every look of a history, the first one first; none where there is no file yet.

    Raises:
        UserError: a line is no look, or not the one that was written.
    """
    looks: list[Look] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate((raw.decode(errors="replace") for raw in lines), 1):
        where, fix = f"history {path}, line {number}", "put the file back as it was, or begin a new one"
        try:
            look = Look.model_validate_json(line)
        except ValidationError as error:
            raise UserError(where, f"no look ({expected_text(error.errors()[0])})", fix) from error
        if look.previous != previous_hash(looks) or look.number != number or line != line_of(look):
            raise UserError(where, "a line before it, or its own spelling, is not what was written", fix)
        looks.append(look)
    return looks


def check_history(path: Path, looks: list[Look], release: str, target: str, name: str) -> None:
    """Raises UserError where a history is of another release, target or slice."""
    for look in looks:
        for thing, theirs, ours in (
            ("release", look.release, release),
            ("target", look.target, target),
            ("slice", look.slice, name),
        ):
            if theirs != ours:
                problem = f"look {look.number} is of the {thing} {theirs[:12]}, this one is {ours[:12]}"
                raise UserError(f"history {path}", problem, FRESH)


def check_new(path: Path, looks: list[Look], ids: list[str]) -> None:
    """Raises UserError where a document is in the history already."""
    known = {name: look for look in looks for name in look.seen.id}
    for name in ids:
        if name in known:
            problem = f"document {name} was seen at look {known[name].number} of {known[name].day}"
            raise UserError(f"history {path}", problem, "give each text once: copies are no evidence")


@contextmanager
def lock_history(path: Path) -> Iterator[None]:
    """Holds a history for this process alone, from reading it to writing it.

    Raises:
        UserError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"history {path}", "another process adds a look", "wait for it") from error
        yield


def write_history(path: Path, looks: list[Look]) -> None:
    """The file appears whole or stays as it was."""
    write_text(path, "".join(map(line_of, looks)))


def summed(bits: Bits, groups: list[str]) -> Bits:
    """Bits by group, in the order in which the groups come first."""
    places = {name: f"{place:09}" for place, name in enumerate(dict.fromkeys(groups))}
    return bits.by_cluster([places[name] for name in groups])


def drift_values(bits: Bits, tokens: Array, unigram: ArrayLike, groups: list[str]) -> dict[str, Array]:
    """One value per group for every question of `eval.stats.drift`: that of its first document.

    A mean would be less spread than single documents are, and drift wherever groups are of another size.
    """
    first = np.sort(np.unique(groups, return_index=True)[1])
    values = [bits.bytes, bits.bytes / tokens, np.asarray(unigram), bits.fallback / bits.bytes]
    return {name: value[first] for name, value in zip(QUESTIONS, values, strict=True)}


@dataclass(frozen=True)
class Series:
    """Everything that was seen so far, in the order of time."""

    documents: Bits  # of each document
    tokens: Array  # of each document, and its bits per token by the training unigram
    unigram: Array
    groups: list[str]  # of each document
    domain: list[str]
    starts: list[int]  # the first document of each look
    days: list[str]
    tuned: float

    @property
    def bits(self) -> Bits:
        """Of everything so far, summed by group."""
        return self.since(0)

    def since(self, start: int) -> Bits:
        """The documents from one on, summed by group: one that comes back is a group of these looks, too."""
        return summed(self.documents.since(start), self.groups[start:])

    def values_since(self, start: int) -> dict[str, Array]:
        """The same of the values of drift."""
        part = self.documents.since(start), self.tokens[start:], self.unigram[start:]
        return drift_values(*part, self.groups[start:])


def series_of(looks: list[Look], domain: str | None = None) -> Series:
    """The looks as arrays; of one domain alone, as if nothing else had been seen."""
    columns: dict[str, list[Any]] = {name: [] for name in (*MODELS, "bytes", "tokens", "unigram")}
    groups: list[str] = []
    domains: list[str] = []
    starts: list[int] = []
    days: list[str] = []
    for look in looks:
        rows = [i for i, name in enumerate(look.seen.domain) if domain in (None, name)]
        if rows:
            starts.append(len(groups))
            days.append(look.day)
        of_look = look.seen.groups
        groups += [of_look[i] for i in rows]
        domains += [look.seen.domain[i] for i in rows]
        for name, column in columns.items():
            values = getattr(look.seen, name)
            column += [values[i] for i in rows]
    arrays = {name: np.asarray(column, float) for name, column in columns.items()}
    tokens, unigram = arrays.pop("tokens"), arrays.pop("unigram")
    return Series(Bits(**arrays), tokens, unigram, groups, domains, starts, days, looks[0].tuned)
