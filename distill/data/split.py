"""The data artifact: documents of all sources, split by the hash of their ids and written once.

The lowest hashes are validation, the highest are test, all between are training: a new document moves at most
one other, and none between validation and test. A group of documents is ranked, and moves, as one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers import PreTrainedTokenizerBase

from distill.data.near_duplicates import NearDuplicates, require_minhash, signature, write_signatures
from distill.data.parse import EMPTY_FILE, ID_DIGITS, content_hash
from distill.data.sources import fingerprint, libraries, list_reasons, read_source, source_name
from distill.data.spool import HashSet, Spool, document_line, short_hash
from eval.core.artifacts import (
    Key,
    Manifest,
    build_artifact,
    installed_versions,
    is_done,
    make_key,
    read_manifest,
)
from eval.core.documents import TEST, TRAIN, TRANSFER, VALIDATION, Document, cluster_names, part_of_test
from eval.core.documents.chats import ChatRefused, lay_out
from eval.core.errors import UserError
from eval.core.sections import Data, Source
from eval.core.study import Study

LATER = {
    "context",
    "train_rows",
    "packing",
    "loss_on",
    "end_of_text",
    "tasks",
    "cluster",
    "corruptions",
}  # rows, scores
GROUP_SHARE = 8  # a group gives at most this part of a split, so that a split has groups enough to speak of
COPY, SHORT, NEAR = "a copy of another", "shorter than data.min_bytes", "nearly a training document"
MORE = "more of a group in validation or test"
NEAR_SCORED = "nearly a scored document"


@dataclass
class Pool:
    """Documents of some sources, and what of them was left out."""

    numbers: range  # in the spool
    left_out: Counter[str]
    empty_files: int = 0

    @property
    def rows(self) -> int:
        return len(self.numbers) + self.left_out.total()


class Reader:
    """Reads sources one after another, and knows what it has seen: a copy in two splits would leak.

    Args:
        held_out: documents that are scored: neither they nor what is of their groups is read.
        near: an index of documents whose near-duplicates are not read.
    """

    def __init__(
        self,
        data: Data,
        spool: Spool,
        tokenizers: Sequence[PreTrainedTokenizerBase] = (),
        held_out: Iterable[Document] = (),
        near: NearDuplicates | None = None,
    ) -> None:
        self.data, self.spool, self.tokenizers, self.near = data, spool, tokenizers, near
        self._seen, self._groups = HashSet(), set[str]()
        for document in held_out:
            self._seen.add(_content(document))
            self._groups.add(document.group)
        self._near_reason = NEAR_SCORED if self._groups else NEAR

    def read(self, where: str, sources: list[Source]) -> Pool:
        """Documents of `sources`, without those that are nearly of the index.

        Raises:
            UserError: two have one id, or more than `data.max_dropped` of a source cannot be used.
        """
        pool, ids, weighted = Pool(range(0), Counter()), HashSet(), any(source.weight for source in sources)
        start = len(self.spool)
        for number, source in enumerate(sources):
            first, left_out = len(self.spool), Counter[str]()
            for document in self._usable(source, left_out):
                if short_hash(document.id) in ids:
                    self._check_id(where, document, start)
                ids.add(short_hash(document.id))
                self.spool.add(replace(document, source=number), weighted)
            pool.empty_files += left_out.pop(EMPTY_FILE, 0)
            part = Pool(range(first, len(self.spool)), left_out)
            self._check_dropped(f"{where}, {source_name(source)}" if len(sources) > 1 else where, part)
            pool.left_out += left_out
        pool.numbers = range(start, len(self.spool))
        return pool

    def _check_id(self, where: str, document: Document, start: int) -> None:
        """Refuses a document whose id another one from `start` on has, and not only its hash."""
        alike = start + np.flatnonzero(self.spool.ids[start:] == np.uint64(short_hash(document.id)))
        for other in map(self.spool.document, alike.tolist()):
            if other.id == document.id:
                fix = "give each its own id, or name no id_column: then the content is the id"
                rows = f"{other.origin} and {document.origin}"
                raise UserError(where, f"two documents have the id {document.id!r}: {rows}", fix)

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

    def _usable(self, source: Source, left_out: Counter[str]) -> Iterator[Document]:
        for document in read_source(source, left_out, self.data.labels):
            content = _content(document)
            if content in self._seen:
                left_out[COPY] += 1
            elif document.bytes < self.data.min_bytes:
                left_out[SHORT] += 1
            elif refusal := self._refusal(document):
                left_out[refusal] += 1
            elif self.near is not None and self.near.find(document):
                left_out[self._near_reason] += 1
            elif document.group in self._groups:
                left_out[MORE] += 1
            else:
                self._seen.add(content)
                yield document


def _content(document: Document) -> int:
    return int(content_hash(document.text, document.prompt, document.tools)[:ID_DIGITS], 16)


def join_groups(groups: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """[N] numbers of documents that have the group of each, once near-duplicates are in one.

    The group is the one with the lowest hash; a document whose group stays has its own number.

    Args:
        groups: [N] hashes of groups.
        pairs: [P, 2] numbers of near-duplicates.
    """
    known, first, group = np.unique(groups, return_index=True, return_inverse=True)
    edges = np.ones(len(pairs), dtype=bool), (group[pairs[:, 0]], group[pairs[:, 1]])
    _, component = connected_components(coo_array(edges, shape=(len(known),) * 2), directed=False)
    _, least = np.unique(component, return_index=True)  # of its groups, which are sorted
    new = least[component][group]
    return np.where(new == group, np.arange(len(groups)), first[new])


def split_numbers(groups: np.ndarray, ids: np.ndarray, data: Data) -> tuple[dict[str, np.ndarray], int]:
    """Documents by split, and how many were left out because their group had given enough to another split.

    Args:
        groups: [N] hashes of groups.
        ids: [N] hashes of ids.

    Raises:
        UserError: there are too few documents, or too few groups of them.
    """
    order = np.lexsort((ids, groups))
    needed = f"need more than {data.validation} for validation + {data.test} for test"
    if len(order) <= data.validation + data.test:
        fix = "add documents, or lower data.validation or data.test"
        raise UserError("data", f"{len(order)} documents, {needed}", fix)
    starts = np.flatnonzero(np.append(True, np.diff(groups[order]) != 0))
    ends = np.append(starts[1:], len(order))
    first, last, splits = 0, len(starts), dict[str, np.ndarray]()  # of groups, those between are left
    for name, count in ((VALIDATION, data.validation), (TEST, data.test)):
        taken: list[int] = []
        while first < last and len(taken) < count:
            first, last = (first + 1, last) if name == VALIDATION else (first, last - 1)
            place = first - 1 if name == VALIDATION else last
            most = min(max(1, count // GROUP_SHARE), count - len(taken))
            taken += order[starts[place] : ends[place]][:most].tolist()
        splits[name] = np.array(taken, dtype=np.int64)
    if first == last:
        problem = f"{len(starts)} groups of {len(order)} documents, {needed}"
        most_of = max(1, data.validation // GROUP_SHARE)
        problem += f", of which a group gives at most {most_of}"
        raise UserError("data", problem, "group documents more finely, or lower data.validation or data.test")
    splits[TRAIN] = order[starts[first] : ends[last - 1]]
    return splits, len(order) - sum(map(len, splits.values()))


def _truncate(document: Document, limit: int) -> Document:
    """The first `limit` bytes in whole characters; an answer to a prompt is not cut."""
    if document.prompt:
        return document
    return replace(document, text=document.text.encode()[:limit].decode(errors="ignore"))


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as out:
        out.writelines(lines)


def _read_shifted(reader: Reader) -> dict[str, Pool]:
    pools: dict[str, Pool] = {}
    for name, sources in reader.data.shifted.items():
        if name in (TRAIN, VALIDATION, TEST, TRANSFER):
            raise UserError(f"data.shifted.{name}", "this name is reserved", "give the slice another name")
        pools[name] = reader.read(f"slice {name!r}", sources)
        if not pools[name].numbers:
            problem = "no documents, or all are copies of others"
            fix = f"give data.shifted.{name} documents that are not among those before it, or leave it out"
            raise UserError(f"slice {name!r}", problem, fix)
    return pools


def part_slice(name: str, clusters: list[str], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the documents of a shifted slice that are scored now, and of those set aside as its test.

    Whole clusters are set aside, those with the highest hashes, until they have `count` documents: what is
    not independent is on one side. Two are on each side at least: one alone tells nothing of others.

    Args:
        clusters: [N] the cluster of each document.

    Raises:
        UserError: fewer than two clusters would be left to score.
    """
    sizes, taken = Counter(clusters), set[str]()
    for cluster in sorted(sizes, key=short_hash, reverse=True):
        if len(taken) < 2 or sum(sizes[one] for one in taken) < count:
            taken.add(cluster)
    if (left := len(sizes) - len(taken)) < 2:
        problem = f"{len(clusters)} documents in {len(sizes)} clusters: a test of {count} would leave {left}"
        fix = "add documents of other clusters, or lower data.shifted_test"
        raise UserError(f"slice {name!r}", problem, fix)
    aside = np.array([cluster in taken for cluster in clusters])
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def _part_shifted(data: Data, spool: Spool, splits: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The shifted slices without what is set aside of each, and that."""
    parts: dict[str, np.ndarray] = {}
    for name in data.shifted if data.shifted_test else ():
        documents = [spool.document(number) for number in splits[name].tolist()]
        clusters = cluster_names(documents, data.cluster_of(name))
        scored, aside = part_slice(name, clusters, data.shifted_test)
        parts |= {name: splits[name][scored], part_of_test(name): splits[name][aside]}
    return parts


def _index(spool: Spool, threshold: float, numbers: Sequence[int] | None = None) -> NearDuplicates:
    """An index of all documents of a spool, or of some."""
    signatures = spool.path.with_name("signatures" if numbers is None else "signatures-of-some")
    if numbers is None:
        write_signatures(spool, signatures)
    else:
        _write_lines(signatures, (signature(spool.document(number)).tobytes() for number in numbers))
    return NearDuplicates(signatures, threshold)


def write_splits(
    study: Study, spool: Spool, folder: Path, tokenizers: Sequence[PreTrainedTokenizerBase] = ()
) -> dict[str, Any]:
    """Reads all sources, and writes every split and slice into `folder`; returns the facts of the manifest.

    Raises:
        UserError: too few documents, two with one id, too many rows that cannot be used, or an empty or
            wrongly named slice.
    """
    data, reader, pairs = study.data, Reader(study.data, spool, tokenizers), np.empty((0, 2), dtype=np.int64)
    if data.near_duplicates is not None:
        require_minhash()  # before hours of reading
    pools = {"documents": reader.read("data.documents", data.documents)}
    if data.near_duplicates is not None and len(spool):
        reader.near = _index(spool, data.near_duplicates)
        pairs = reader.near.pairs()
        spool.regroup(join_groups(spool.groups, pairs))
    splits, more = split_numbers(spool.groups, spool.ids, data)
    counts = {name: len(np.unique(spool.groups[numbers])) for name, numbers in splits.items()}
    pools |= _read_shifted(reader)
    splits |= {name: np.array(pool.numbers) for name, pool in pools.items() if name != "documents"}
    splits |= _part_shifted(data, spool, splits)
    held_out = [number for name in splits if name != TRAIN for number in splits[name].tolist()]
    scored = {
        name: [_truncate(spool.document(number), data.scored_bytes) for number in numbers.tolist()]
        for name, numbers in splits.items()
        if name != TRAIN
    }
    if data.transfer:
        near = data.near_duplicates and _index(spool, data.near_duplicates, held_out)
        transfer = Reader(data, spool, tokenizers, map(spool.document, held_out), near or None)
        pools[TRANSFER] = transfer.read("data.transfer", data.transfer)
        splits[TRANSFER] = np.array(pools[TRANSFER].numbers)
        if not len(splits[TRANSFER]):
            fix = "give it documents that are not scored, or leave it out"
            raise UserError("data.transfer", "no documents, or all are scored ones", fix)
    for name in {TRAIN, TRANSFER} & set(splits):
        _write_lines(folder / f"{name}.jsonl", map(spool.line, splits[name].tolist()))
    for name, documents in scored.items():
        _write_lines(
            folder / f"{name}.jsonl", (document_line(document, with_source=True) for document in documents)
        )
    facts: dict[str, Any] = {f"{name}_documents": len(numbers) for name, numbers in splits.items()}
    facts |= {f"{name}_documents": len(documents) for name, documents in scored.items()}
    facts["rows"] = {name: pool.rows for name, pool in pools.items()}
    facts["left_out"] = {name: dict(pool.left_out) for name, pool in pools.items() if pool.left_out}
    if empty := {name: pool.empty_files for name, pool in pools.items() if pool.empty_files}:
        facts["empty_files"] = empty
    facts["groups"] = counts
    if more:
        facts["left_out"].setdefault("documents", {})[MORE] = more
    if data.near_duplicates is not None:
        facts["near_duplicates"] = len(np.unique(pairs))
    return facts


def data_key(study: Study, tokenizers: Sequence[PreTrainedTokenizerBase] = ()) -> Key:
    """Key of the data artifact: the settings, the present state of the sources, and what reads data sets.

    Where there are chats, also their templates, and which of their answers are learned.
    """
    sources = study.data.sources
    settings = study.data.model_dump(mode="json", exclude=LATER)
    settings["corruptions"] = []  # once they were written here: without any the key is what it was
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
        TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp") as spooled,
        Spool(Path(spooled) / "documents") as spool,
    ):
        facts |= write_splits(study, spool, temporary, tokenizers)
    return read_manifest(folder)
