"""Training documents as tokens, made once: an artifact that every job and every process maps into memory.

`ids.bin` has the tokens of all documents laid end to end, `rows.npy` where each row lies in them, `order.npy`
the order in which rows are taken (of packed ones, `ends.npy` where the parts of each end), `skipped.npy`
spans of tokens that are only read, `sources.npy` the source of each document where sources have weights, and
`documents.npy`, `names.bin` and `domains.json` the documents' names.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data.mixture import mix_rows
from eval.core.artifacts import Key, build_artifact, digest, is_done, make_key, read_manifest, write_text
from eval.core.documents import TRAIN, TRANSFER, Document, parse_document
from eval.core.documents.bins import best_fit_bins
from eval.core.documents.encoding import Encoding, Learned, encode, special_ends, windows_of
from eval.core.errors import UserError
from eval.core.jobs import Job, Progress, run_jobs
from eval.core.study import Study

ROWS_PER_DOCUMENT = 4  # at first; more only where all documents have been used
LEAST_SHARE, MOST_SHARE, SHARES = 2**24, 2**25, 16  # bytes of documents for one process; about so many
BATCH = 2**20  # of them at a time
ROW = np.dtype(
    [
        ("document", "<u4"),
        ("index", "<u4"),  # of the window in its document
        ("start", "<u8"),  # in ids.bin
        ("size", "<u4"),
        ("given", "<u4"),
        ("front", "<i4"),  # the token in front; -1: the first one of the row
        ("predicted", "<u4"),
    ]
)
DOCUMENT = np.dtype([("name_end", "<u8"), ("domain", "<u4")])
NO_FRONT = -1
CHATS = "chats 2"  # count on when rows are made of chats in another way: what learned them is made again
_FINGERPRINTS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, str]] = WeakKeyDictionary()


class Share(NamedTuple):
    """A part of the training documents, for one process: whole lines of their file."""

    path: Path
    start: int
    stop: int


def learned_of(study: Study) -> Learned:
    """What is learned of a training document."""
    return Learned(study.data.loss_on, end_of_answer=True, end_of_text=study.data.end_of_text)


def tokens_folder(study: Study, tokenizer: PreTrainedTokenizerBase, split: str = TRAIN) -> Path:
    """Where the tokens of a tokenizer lie: each has its own, and so has the transfer corpus."""
    more = "" if split == TRAIN else f"-{split}"
    return study.folder / "tokens" / f"{fingerprint(tokenizer)[:12]}{more}"


def source_weights(study: Study, split: str) -> list[float]:
    """Of the sources of a split; empty where they have none."""
    sources = study.data.transfer if split == TRANSFER else study.data.documents
    return [source.weight for source in sources if source.weight is not None]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that decides the ids of a text or a chat, wherever the tokenizer lies.

    It is remembered: of a large vocabulary it takes seconds.
    """
    more = sorted(special_ends(tokenizer) - {tokenizer.eos_token_id})
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, *more)
    state = len(tokenizer), *ends, tokenizer.chat_template
    known = _FINGERPRINTS.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    content: Any = tokenizer.get_vocab()
    if tokenizer.is_fast:
        saved = json.loads(tokenizer.backend_tokenizer.to_str())
        content = [saved[name] for name in ("added_tokens", "normalizer", "pre_tokenizer", "model")]
    value = digest([content, ends, tokenizer.chat_template])
    _FINGERPRINTS[tokenizer] = state, value
    return value


def tokens_key(study: Study, tokenizer: PreTrainedTokenizerBase, split: str = TRAIN) -> Key:
    data, weights = study.data, source_weights(study, split)
    settings = [data.context, data.packing, vars(learned_of(study))]
    settings += [split] if split != TRAIN else []
    settings += [weights, data.mixture_seed] if weights else []
    return make_key("tokens", [read_manifest(study.folder / "data").hash, fingerprint(tokenizer), settings])


def make_tokens(
    study: Study, tokenizer: PreTrainedTokenizerBase, split: str = TRAIN, *, verify: bool = True
) -> Path:
    """The folder with the tokens of the documents of a split, made by as many processes as there are cores.

    Other processes that ask for it meanwhile wait. A stop loses at most the shares that were being made.

    Args:
        verify: check the hashes of finished work, which reads all of it; else its key and sizes alone.

    Raises:
        UserError: a document is empty, has no tokens or cannot be laid out.
    """
    folder, key = tokens_folder(study, tokenizer, split), tokens_key(study, tokenizer, split)
    if not verify and _is_whole(folder, key):
        return folder
    with _turn(folder.parent):
        if is_done(folder, key, study.accept_old):
            return folder
        scratch = study.folder / "scratch" / f"tokens-{folder.name}" / key.digest[:16]
        scratch.mkdir(parents=True, exist_ok=True)
        shares = list(_shares(study.folder / "data" / f"{split}.jsonl"))
        _make_shares(study, tokenizer, shares, scratch)
        parents, facts = {"data": read_manifest(study.folder / "data").hash}, dict[str, Any]()
        name = f"tokens/{folder.name}"
        with build_artifact(folder, kind="tokens", name=name, key=key, parents=parents, facts=facts) as new:
            facts |= _join(study, split, scratch, len(shares), new) | {"type": id_type(tokenizer)}
        shutil.rmtree(scratch.parent, ignore_errors=True)
    return folder


def _is_whole(folder: Path, key: Key) -> bool:
    if not (folder / "manifest.json").is_file() or (manifest := read_manifest(folder)).key != key.digest:
        return False
    sizes = {name: (folder / name).stat().st_size for name in manifest.files if (folder / name).is_file()}
    return sizes == {name: entry.bytes for name, entry in manifest.files.items()}


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _shares(path: Path) -> Iterator[Share]:
    """Shares of whole lines, decided by the file alone: what was made of them before a stop counts."""
    size, start = path.stat().st_size, 0
    length = min(MOST_SHARE, max(LEAST_SHARE, size // SHARES))
    with path.open("rb") as lines:
        while start < size:
            lines.seek(min(start + length, size))
            lines.readline()
            yield Share(path, start, stop := lines.tell())
            start = stop


def _make_shares(
    study: Study, tokenizer: PreTrainedTokenizerBase, shares: list[Share], scratch: Path
) -> None:
    """Writes what is missing of the shares; a single one takes threads, not a process of its own."""
    missing = [i for i in range(len(shares)) if not (scratch / f"{i}.npz").is_file()]
    settings = tokenizer, study.data.context, learned_of(study)
    if len(shares) == 1:
        for i in missing:
            _write_share(*settings, shares[i], scratch / str(i), lambda share, tokens=0: None, threads=True)
        return
    jobs = [Job(f"share {i}", _write_share, (*settings, shares[i], scratch / str(i))) for i in missing]
    run_jobs("tokens", jobs, len(os.sched_getaffinity(0)))


def _write_share(
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    learned: Learned,
    share: Share,
    target: Path,
    report: Progress,
    threads: bool = False,
) -> None:
    """Writes `TARGET.ids` and, whole or not at all and last, `TARGET.npz`.

    Args:
        threads: of the tokenizer, one per core; without them, the processes are the parallelism.
    """
    kind, tables = id_type(tokenizer), _Tables(context)
    with (
        _tokenizer_threads(threads),
        share.path.open("rb") as lines,
        target.with_suffix(".ids").open("wb") as out,
    ):
        lines.seek(share.start)
        while (place := lines.tell()) < share.stop:
            some = lines.readlines(
                min(BATCH, share.stop - place) - 1
            )  # it ends with what is longer than that
            documents = [parse_document(line) for line in some]
            _check_not_empty(documents)
            for document, encoding in zip(
                documents, encode(tokenizer, documents, learned, context), strict=True
            ):
                tables.add(document, encoding)
                out.write(np.array(encoding.ids, dtype=kind).tobytes())
            report((lines.tell() - share.start) / (share.stop - share.start), 0)
    temporary = target.with_suffix(".tmp.npz")
    np.savez(temporary, **tables.arrays())
    temporary.replace(target.with_suffix(".npz"))


@contextmanager
def _tokenizer_threads(several: bool) -> Iterator[None]:
    """Inside, fast tokenizers read a batch with one thread per core, or with one alone."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if several else "false"
    try:
        yield
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _check_not_empty(documents: list[Document]) -> None:
    for document in documents:
        if not document.text.strip():
            raise UserError(f"document {document.id!r}", "empty", "remove empty documents")


def id_type(tokenizer: PreTrainedTokenizerBase) -> str:
    """The type of ids on disk: the smallest that holds them all."""
    return "<u2" if max(tokenizer.get_vocab().values()) < 2**16 else "<u4"


class _Tables:
    """What is noted of the documents of a share: names, domains, rows, and how each row sorts."""

    def __init__(self, context: int) -> None:
        self.context, self.length = context, 0
        self.names, self.domains, self.sources = list[bytes](), list[str](), list[int]()
        self.rows = list[tuple[int, ...]]()
        self.ranks, self.hashes = list[int](), list[int]()
        self.skipped = list[tuple[int, int]]()  # spans of ids that are only read

    def add(self, document: Document, encoding: Encoding) -> None:
        """Notes a document whose tokens start where those of the last one end."""
        number, start, skipped = len(self.names), self.length, encoding.skipped
        self.names.append(document.id.encode())
        self.domains.append(document.domain)
        self.sources.append(document.source)
        self.length += len(encoding.ids)
        self.skipped += [(start + first, start + end) for first, end in skipped]
        front, bare = (NO_FRONT, 1) if encoding.front is None else (encoding.front, 0)
        ranked = []
        for i, (first, stop, given) in enumerate(windows_of(encoding, self.context)):
            least = first + given + bare
            predicted = stop - least - sum(max(0, min(b, stop) - max(a, least)) for a, b in skipped)
            if predicted:
                row = (number, i, start + first, stop - first, given, front, predicted)
                ranked.append((sha256(f"{document.id}#{i}".encode()).digest()[:8], row))
        ranked.sort(key=lambda pair: pair[0])
        self.rows += [row for _, row in ranked]
        self.ranks += range(len(ranked))
        self.hashes += [int.from_bytes(key, "big") for key, _ in ranked]

    def arrays(self) -> dict[str, Any]:
        domains, domain = np.unique(self.domains, return_inverse=True)
        return {
            "rows": np.array(self.rows, dtype=ROW),
            "ranks": np.array(self.ranks, dtype=np.int64),
            "hashes": np.array(self.hashes, dtype=np.uint64),
            "skipped": np.array(self.skipped, dtype=np.int64).reshape(-1, 2),
            "names": np.frombuffer(b"".join(self.names), dtype=np.uint8),
            "name_sizes": np.array([len(name) for name in self.names], dtype=np.uint32),
            "domains": domains,
            "domain": domain.astype(np.uint32),
            "sources": np.array(self.sources, dtype=np.uint16),
            "length": np.array(self.length),
        }


def _join(study: Study, split: str, scratch: Path, count: int, folder: Path) -> dict[str, Any]:
    """Lays the shares end to end in a folder; returns facts for its manifest."""
    with (folder / "ids.bin").open("wb") as out:
        for i in range(count):
            with (scratch / f"{i}.ids").open("rb") as share:
                shutil.copyfileobj(share, out, 2**22)
    joined, domains = _join_tables([np.load(scratch / f"{i}.npz") for i in range(count)])
    documents, domain = len(joined["name_sizes"]), joined["domain"]
    table = np.zeros(documents, dtype=DOCUMENT)
    table["name_end"], table["domain"] = np.cumsum(joined["name_sizes"], dtype=np.uint64), domain
    rows, order = joined["rows"], _order(joined["ranks"], joined["hashes"])
    if weights := source_weights(study, split):
        sources, tokens = joined["sources"][rows["document"]], rows["predicted"]
        order = mix_rows(order, sources, tokens, weights, study.data.mixture_seed)
        np.save(folder / "sources.npy", joined["sources"])
    if study.data.packing:
        order, ends = _pack(rows, order, domain, study.data.context)
        np.save(folder / "ends.npy", ends)
    if len(joined["skipped"]):
        np.save(folder / "skipped.npy", joined["skipped"])
    for name, array in (("rows", rows), ("order", order), ("documents", table)):
        np.save(folder / f"{name}.npy", array)
    joined["names"].tofile(folder / "names.bin")
    write_text(folder / "domains.json", json.dumps(domains, ensure_ascii=False))
    packed = len(ends) if study.data.packing else len(order)
    labelled = {"labelled": True} if study.data.labels else {}
    return {"documents": documents, "rows": packed, "tokens": int(rows["predicted"][order].sum()), **labelled}


def _join_tables(shares: list[Any]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tables of all shares end to end, and the names of the domains; one share is read at a time."""
    domains = np.unique(np.concatenate([share["domains"] for share in shares]))
    parts: dict[str, list[np.ndarray]] = {}
    length = documents = 0
    for share in shares:
        tables: dict[str, Any] = dict(share)
        tables["rows"]["document"] += documents
        tables["rows"]["start"] += length
        tables["skipped"] += length
        tables["domain"] = np.searchsorted(domains, tables.pop("domains")).astype(np.uint32)[tables["domain"]]
        length, documents = length + int(tables.pop("length")), documents + len(tables["name_sizes"])
        for name, table in tables.items():
            parts.setdefault(name, []).append(table)
    return {name: np.concatenate(parts.pop(name)) for name in list(parts)}, domains.tolist()


def _order(ranks: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """The order in which rows are taken: a few of each document in turn, then the rest by hash."""
    first, rest = np.flatnonzero(ranks < ROWS_PER_DOCUMENT), np.flatnonzero(ranks >= ROWS_PER_DOCUMENT)
    return np.concatenate([first, rest[np.argsort(hashes[rest], kind="stable")]])


def _pack(
    rows: np.ndarray, order: np.ndarray, domain: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray]:
    """The parts of packed rows, taken in the order of their first parts, and where each row ends."""
    lengths = (rows["size"] + (rows["front"] != NO_FRONT))[order]
    domains = domain[rows["document"][order]]
    first = np.empty(len(order), dtype=np.int64)  # place of the first part of the row of each
    for name in np.unique(domains):
        places = np.flatnonzero(domains == name)
        first[places] = places[best_fit_bins(lengths[places], context)]
    together = np.argsort(first, kind="stable")
    ends = np.flatnonzero(np.diff(first[together], append=-1)) + 1
    return order[together], ends
