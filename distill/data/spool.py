"""Documents on disk until it is known where each goes: in memory are a few numbers of each."""

import json
import os
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from distill.data.parse import ID_DIGITS, content_hash
from eval.core.artifacts import text_sha256
from eval.core.documents import Document, parse_document

RECENT = 2**16  # hashes of a set that are not sorted yet, at least


def short_hash(text: str) -> int:
    """64 bits of the SHA-256, the first ones: they sort as the whole does."""
    return int(text_sha256(text)[:ID_DIGITS], 16)


def document_line(document: Document, with_source: bool = False) -> bytes:
    """A document as the file of its split has it."""
    d = document
    row: dict[str, Any] = {"id": d.id, "group": d.group, "domain": d.domain, "origin": d.origin}
    row |= {"source": d.source} if with_source else {}
    row |= {"bytes": d.bytes, "sha256": content_hash(d.text, d.prompt, d.tools), "text": d.text}
    row |= {name: value for name, value in (("tools", d.tools), ("calls", d.calls)) if value}
    row |= {} if d.label is None else {"label": d.label}
    return _encode(row | ({"prompt": d.prompt} if d.prompt else {}))


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


class HashSet:
    """A set of 64-bit hashes that takes about ten bytes for each: a sorted array, and a set of the latest."""

    def __init__(self) -> None:
        self._sorted, self._recent = np.empty(0, dtype=np.uint64), set[int]()

    def __contains__(self, value: int) -> bool:
        if value in self._recent:
            return True
        place = int(self._sorted.searchsorted(np.uint64(value)))
        return place < len(self._sorted) and int(self._sorted[place]) == value

    def add(self, value: int) -> None:
        self._recent.add(value)
        if len(self._recent) >= max(RECENT, len(self._sorted) // 16):  # in all, sorting stays linear
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent = set()


class Spool:
    """Documents by their numbers: lines of a file, and hashes of their ids and groups."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("w+b")
        self._ends, self._ids, self._groups = array("Q", [0]), array("Q"), array("Q")
        self._sources = array("I")
        self._of_group = np.empty(0, dtype=np.int64)  # [M] documents that have the first ones' groups

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def ends(self) -> np.ndarray:
        """[N + 1] places in the file where a line starts, and where the last one ends."""
        return np.array(self._ends)

    @property
    def ids(self) -> np.ndarray:
        """[N] hashes of ids."""
        return np.array(self._ids)

    @property
    def groups(self) -> np.ndarray:
        """[N] hashes of groups."""
        return np.array(self._groups)

    def add(self, document: Document, with_source: bool = False) -> None:
        self._ends.append(self._ends[-1] + self._file.write(document_line(document, with_source)))
        self._sources.append(document.source)
        self._ids.append(short_hash(document.id))
        self._groups.append(self._ids[-1] if document.group == document.id else short_hash(document.group))

    def flush(self) -> None:
        """Brings to the file what was added."""
        self._file.flush()

    def regroup(self, of_group: np.ndarray) -> None:
        """Gives the first M documents the groups that others have: [M] their numbers, or their own."""
        self._groups[: len(of_group)] = array("Q", self.groups[of_group].tobytes())
        self._of_group = of_group

    def line(self, number: int) -> bytes:
        """The line of a document, in the group that it has now."""
        line = self._read(number)
        if number >= len(self._of_group) or (other := int(self._of_group[number])) == number:
            return line
        return _encode(json.loads(line) | {"group": json.loads(self._read(other))["group"]})

    def _read(self, number: int) -> bytes:
        self.flush()
        start, end = self._ends[number], self._ends[number + 1]
        return os.pread(self._file.fileno(), end - start, start)

    def document(self, number: int) -> Document:
        return replace(parse_document(self.line(number)), source=self._sources[number])
