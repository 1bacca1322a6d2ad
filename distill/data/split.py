"""The data artifact: documents of all sources, split by the hash of their ids and written once.

The lowest hashes are validation, the highest are test, all between are training: a new document moves at most
one other, and none between validation and test. A group of documents is ranked, and moves, as one.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from scipy.cluster.hierarchy import DisjointSet
from transformers import PreTrainedTokenizerBase

from distill.data.near_duplicates import NearDuplicates
from distill.data.parse import EMPTY_FILE, content_hash, sha256
from distill.data.sources import fingerprint, libraries, list_reasons, read_source, source_name
from eval.core.artifacts import (
    Key,
    Manifest,
    build_artifact,
    installed_versions,
    is_done,
    make_key,
    read_manifest,
)
from eval.core.documents import TEST, TRAIN, TRANSFER, VALIDATION, Document
from eval.core.documents.encoding import ChatRefused, lay_out
from eval.core.errors import UserError
from eval.core.sections import Data, Source
from eval.core.study import Study
from eval.score.corruptions import damaged_slices

LATER = {
    "context",
    "train_rows",
    "packing",
    "loss_on",
    "end_of_text",
    "tasks",
    "cluster",
}  # rows, scores
GROUP_SHARE = 8  # a group gives at most this part of a split, so that a split has groups enough to speak of
COPY, SHORT, NEAR = "a copy of another", "shorter than data.min_bytes", "nearly a training document"
MORE = "more of a group in validation or test"
NEAR_SCORED = "nearly a scored document"


@dataclass(slots=True)
class Entry:
    """What is remembered of a document while it lies on disk."""

    id: str
    group: str
    place: int  # of its first byte


class Spool:
    """Documents on disk, until it is known where each goes: of a corpus only the index is in memory."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 closed by __exit__
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, document: Document) -> Entry:
        place = self._end
        self._file.seek(place)
        self._end += self._file.write(json.dumps(asdict(document)).encode() + b"\n")
        return Entry(document.id, document.group, place)

    def read(self, entry: Entry) -> Document:
        """The document of an entry, in the group that the entry has now."""
        self._file.seek(entry.place)
        document = Document(**json.loads(self._file.readline()))
        return replace(document, group=entry.group)


@dataclass
class Pool:
    """Documents of some sources, and what of them was left out."""

    entries: list[Entry]
    left_out: Counter[str]
    empty_files: int = 0

    @property
    def rows(self) -> int:
        return len(self.entries) + self.left_out.total()


class Reader:
    """Reads sources one after another, and knows what it has seen: a copy in two splits would leak.

    Args:
        held_out: documents that are scored: neither they nor what is of their groups is read.
    """

    def __init__(
        self,
        data: Data,
        spool: Spool,
        tokenizers: Sequence[PreTrainedTokenizerBase] = (),
        held_out: Iterable[Document] = (),
    ) -> None:
        self.data, self.spool, self.tokenizers = data, spool, tokenizers
        self._seen, self._groups = set[bytes](), set[str]()
        self._near = None if data.near_duplicates is None else NearDuplicates(data.near_duplicates)
        self._near_reason = NEAR_SCORED if held_out else NEAR
        for document in held_out:
            self._seen.add(_content(document))
            self._groups.add(document.group)
            if self._near is not None:
                self._near.add(document)
        self.pairs: list[tuple[str, str]] = []  # ids of documents to split that are nearly the same

    def read(self, where: str, sources: list[Source], splits: bool) -> Pool:
        """Documents of `sources`, to be split or else only scored: then no near-duplicates of the former.

        Raises:
            UserError: two have one id, or more than `data.max_dropped` of a source cannot be used.
        """
        pool, ids = Pool([], Counter()), set[str]()
        for number, source in enumerate(sources):
            part = Pool([], Counter())
            for document in self._usable(source, part.left_out, splits):
                if document.id in ids:
                    entries = [*pool.entries, *part.entries]
                    first = next(entry for entry in entries if entry.id == document.id)
                    rows = f"{self.spool.read(first).origin} and {document.origin}"
                    fix = "give each its own id, or name no id_column: then the content is the id"
                    raise UserError(where, f"two documents have the id {document.id!r}: {rows}", fix)
                ids.add(document.id)
                part.entries.append(self.spool.add(replace(document, source=number)))
            pool.empty_files += part.left_out.pop(EMPTY_FILE, 0)
            self._check_dropped(f"{where}, {source_name(source)}" if len(sources) > 1 else where, part)
            pool.entries += part.entries
            pool.left_out += part.left_out
        return pool

    def _check_dropped(self, where: str, part: Pool) -> None:
        share = part.left_out.total() / max(1, part.rows)
        if share > self.data.max_dropped:
            problem = f"{share:.0%} of {part.rows} rows cannot be used: {list_reasons(part.left_out)}"
            fix = f"clean them, or raise data.max_dropped (now {self.data.max_dropped:g})"
            raise UserError(where, problem, fix)

    def _refusal(self, document: Document) -> str:
        """Why a tokenizer's template does not lay out a chat; empty where all do."""
        if isinstance(document.prompt, str):
            return ""
        for tokenizer in self.tokenizers:
            try:
                lay_out(tokenizer, document, self.data.loss_on)
            except ChatRefused as error:
                return str(error.problem)
        return ""

    def _usable(self, source: Source, left_out: Counter[str], splits: bool) -> Iterator[Document]:
        for document in read_source(source, left_out):
            content = _content(document)
            if content in self._seen:
                left_out[COPY] += 1
            elif document.bytes < self.data.min_bytes:
                left_out[SHORT] += 1
            elif refusal := self._refusal(document):
                left_out[refusal] += 1
            elif self._near is not None and not splits and self._near.find(document):
                left_out[self._near_reason] += 1
            elif document.group in self._groups:
                left_out[MORE] += 1
            else:
                self._seen.add(content)
                if self._near is not None and splits:
                    self.pairs += [(document.id, other) for other in self._near.add(document)]
                yield document


def _content(document: Document) -> bytes:
    return bytes.fromhex(content_hash(document.text, document.prompt))


def join_groups(entries: list[Entry], pairs: list[tuple[str, str]]) -> None:
    """Gives groups that share near-duplicates one name, in place: that of the lowest hash among them."""
    if not pairs:
        return
    group_of = {entry.id: entry.group for entry in entries}
    joined: DisjointSet = DisjointSet({group_of[name] for pair in pairs for name in pair})
    for one, other in pairs:
        joined.merge(group_of[one], group_of[other])
    names = {group: min(subset, key=sha256) for subset in joined.subsets() for group in subset}
    for entry in entries:
        entry.group = names.get(entry.group, entry.group)


def split_entries(entries: list[Entry], data: Data) -> tuple[dict[str, list[Entry]], int]:
    """Entries by split, and how many were left out because their group had given enough to another split.

    Raises:
        UserError: there are too few documents, or too few groups of them.
    """
    entries = sorted(entries, key=lambda entry: (sha256(entry.group), sha256(entry.id)))
    needed = f"need more than {data.validation} for validation + {data.test} for test"
    if len(entries) <= data.validation + data.test:
        fix = "add documents, or lower data.validation or data.test"
        raise UserError("data", f"{len(entries)} documents, {needed}", fix)
    groups = [list(group) for _, group in groupby(entries, key=lambda entry: entry.group)]
    splits: dict[str, list[Entry]] = {}
    for name, count, place in ((VALIDATION, data.validation, 0), (TEST, data.test, -1)):
        splits[name] = []
        while groups and len(splits[name]) < count:
            most = min(max(1, count // GROUP_SHARE), count - len(splits[name]))
            splits[name] += groups.pop(place)[:most]
    if not groups:
        problem = f"{len({entry.group for entry in entries})} groups of {len(entries)} documents, {needed}"
        most_of = max(1, data.validation // GROUP_SHARE)
        problem += f", of which a group gives at most {most_of}"
        raise UserError("data", problem, "group documents more finely, or lower data.validation or data.test")
    splits[TRAIN] = [entry for group in groups for entry in group]
    return splits, len(entries) - sum(map(len, splits.values()))


def write_documents(path: Path, documents: Iterator[Document], with_source: bool = False) -> None:
    with path.open("w", encoding="utf-8") as out:
        for d in documents:
            row: dict[str, Any] = {"id": d.id, "group": d.group, "domain": d.domain, "origin": d.origin}
            row |= {"source": d.source} if with_source else {}
            row |= {"bytes": d.bytes, "sha256": content_hash(d.text, d.prompt), "text": d.text}
            out.write(json.dumps(row | ({"prompt": d.prompt} if d.prompt else {}), ensure_ascii=False) + "\n")


def _truncate(document: Document, limit: int) -> Document:
    """The first `limit` bytes in whole characters; an answer to a prompt is not cut."""
    if document.prompt:
        return document
    return replace(document, text=document.text.encode()[:limit].decode(errors="ignore"))


def _write_trained_on(data: Data, spool: Spool, splits: dict[str, list[Entry]], folder: Path) -> None:
    for name, sources in ((TRAIN, data.documents), (TRANSFER, data.transfer)):
        if name in splits:
            weighted = any(source.weight for source in sources)
            write_documents(folder / f"{name}.jsonl", map(spool.read, splits[name]), weighted)


def _read_shifted(reader: Reader) -> dict[str, Pool]:
    pools: dict[str, Pool] = {}
    for name, sources in reader.data.shifted.items():
        if name in (TRAIN, VALIDATION, TEST, TRANSFER):
            raise UserError(f"data.shifted.{name}", "this name is reserved", "give the slice another name")
        pools[name] = reader.read(f"slice {name!r}", sources, splits=False)
        if not pools[name].entries:
            problem = "no documents, or all are copies of others"
            raise UserError(f"slice {name!r}", problem, "fix its source")
    return pools


def write_splits(
    study: Study, spool: Spool, folder: Path, tokenizers: Sequence[PreTrainedTokenizerBase] = ()
) -> dict[str, Any]:
    """Reads all sources, and writes every split and slice into `folder`; returns the facts of the manifest.

    Raises:
        UserError: too few documents, two with one id, too many rows that cannot be used, or an empty or
            wrongly named slice.
    """
    data, reader = study.data, Reader(study.data, spool, tokenizers)
    pools = {"documents": reader.read("data.documents", data.documents, splits=True)}
    join_groups(pools["documents"].entries, reader.pairs)
    splits, more = split_entries(pools["documents"].entries, data)
    counts = {name: len({entry.group for entry in splits[name]}) for name in splits}
    pools |= _read_shifted(reader)
    for name, pool in pools.items():
        splits |= {name: pool.entries} if name != "documents" else {}
    scored = {
        name: [_truncate(spool.read(entry), data.scored_bytes) for entry in entries]
        for name, entries in splits.items()
        if name != TRAIN
    }
    if data.transfer:
        held_out = [spool.read(e) for name, entries in splits.items() if name != TRAIN for e in entries]
        transfer = Reader(data, spool, tokenizers, held_out)
        pools[TRANSFER] = transfer.read("data.transfer", data.transfer, splits=False)
        splits[TRANSFER] = pools[TRANSFER].entries
        if not splits[TRANSFER]:
            raise UserError("data.transfer", "no documents, or all are scored ones", "fix its sources")
    _write_trained_on(data, spool, splits, folder)
    scored |= damaged_slices(scored[VALIDATION], data.corruptions, splits)
    for name, documents in scored.items():
        write_documents(folder / f"{name}.jsonl", iter(documents), with_source=True)
    facts: dict[str, Any] = {f"{name}_documents": len(entries) for name, entries in splits.items()}
    facts |= {f"{name}_documents": len(documents) for name, documents in scored.items()}
    facts["rows"] = {name: pool.rows for name, pool in pools.items()}
    facts["left_out"] = {name: dict(pool.left_out) for name, pool in pools.items() if pool.left_out}
    if empty := {name: pool.empty_files for name, pool in pools.items() if pool.empty_files}:
        facts["empty_files"] = empty
    facts["groups"] = counts
    if more:
        facts["left_out"].setdefault("documents", {})[MORE] = more
    if data.near_duplicates is not None:
        facts["near_duplicates"] = len({name for pair in reader.pairs for name in pair})
    return facts


def data_key(study: Study, tokenizers: Sequence[PreTrainedTokenizerBase] = ()) -> Key:
    """Key of the data artifact: the settings, the present state of the sources, and what reads data sets.

    Where there are chats, also their templates, and which of their answers are learned.
    """
    sources = study.data.sources
    settings = study.data.model_dump(mode="json", exclude=LATER)
    names = {name for source in sources for name in libraries(source)}
    names |= {"datasketch"} if study.data.near_duplicates is not None else set()
    fingerprints = [fingerprint(source) for source in sources]
    chats = [[one.chat_template, one.special_tokens_map, study.data.loss_on] for one in tokenizers]
    parts = [settings, fingerprints, *([chats] if chats else [])]
    return make_key("data", parts, installed_versions(sorted(names)))


def prepare(study: Study, tokenizers: Sequence[PreTrainedTokenizerBase] = ()) -> Manifest:
    """Writes the data artifact of a study, unless it is there already.

    Args:
        tokenizers: chats that the template of one of them does not lay out are left out, and counted.
    """
    folder, key = study.folder / "data", data_key(study, tokenizers)
    if is_done(folder, key, study.accept_old):
        return read_manifest(folder)
    facts: dict[str, Any] = {}
    with (
        build_artifact(folder, kind="data", name="data", key=key, parents={}, facts=facts) as temporary,
        Spool(temporary.parent) as spool,
    ):
        facts |= write_splits(study, spool, temporary, tokenizers)
    return read_manifest(folder)
