"""Documents of a data artifact, and the rows of tokens that every stage makes of them in the same way."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import psutil

from eval.core.documents.bins import best_fit
from eval.core.documents.encoding import (
    SCORED,
    Learned,
    Span,
    boundary_id,
    encode,
    window_tokens,
    windows_of,
)
from eval.core.errors import UserError
from eval.core.records import VALIDATION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CPU_TOKENS, CUDA_TOKENS = 2**12, 2**15  # padded, per forward pass, at most
COPIES, CPU_SHARE = 8, 16  # see `tokens_per_batch`
TRAIN, TEST = "train", "test"
NO_FOLDER = "top"  # domain of the files of a folder that lie in no folder below it
TRANSFER = "transfer"  # documents that students learn from their teachers on, where there are such
Line = tuple[str, int, str]  # "FILE, line N", its number N, its text


@dataclass(frozen=True)
class Document:
    """A text, and what comes before it: nothing, a prompt, or the turns of a chat."""

    id: str
    domain: str
    text: str  # what is learned and scored
    prompt: str | list[dict[str, Any]] = ""  # turns: {"role": ..., "content": ...}
    group: str = ""  # of documents that are on one side of a split, such as those of an author
    origin: str = ""  # where it was found, for messages: a file, and the row in it
    source: int = 0  # number of the source that it is of: of scored documents, and where sources have weights
    tools: Sequence[dict[str, Any]] = ()  # JSON schemas of what a chat's assistant may call
    calls: Sequence[dict[str, Any]] = ()  # of tools, at the end of a chat: `text` ends with their JSON
    label: int | None = None  # number of its class in `data.labels`, which is then all that is predicted

    @property
    def bytes(self) -> int:
        return len(self.text.encode())

    @property
    def size(self) -> int:
        """What its bits are divided by: the bytes of a text, the one example that a labelled text is."""
        return self.bytes if self.label is None else 1


@dataclass(frozen=True)
class Row:
    """A window of one document: the boundary token, then up to context - 1 tokens; or several, packed."""

    document: str  # id
    domain: str
    index: int  # of the window in its document
    tokens: list[int]
    given: int = 0  # so many tokens after the boundary are context and not predicted
    packed: tuple[tuple[int, int], ...] = ()  # of several rows in one: their lengths and what is given
    skipped: tuple[Span, ...] = ()  # places of further tokens that are context: what is said between answers
    labelled: bool = False  # the last of `tokens` is no token but the label: no model may read it

    @property
    def id(self) -> str:
        more = f"+{len(self.packed) - 1}" if self.packed else ""
        return f"{self.document}#{self.index}{more}"

    @property
    def read(self) -> list[int]:
        """What a model reads."""
        return self.tokens[:-1] if self.labelled else self.tokens

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Length and number of given tokens of every row in this one."""
        return self.packed or ((len(self.tokens), self.given),)

    @property
    def predicted(self) -> int:
        """Number of tokens that are learned or scored."""
        read = sum(end - start for start, end in self.skipped)
        return sum(length - 1 - given for length, given in self.parts) - read


class ChosenRows(Sequence[Row]):
    """Rows at some places of others, each read when it is asked for."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> ChosenRows: ...
    def __getitem__(self, place: int | slice) -> Row | ChosenRows:
        if isinstance(place, slice):
            return ChosenRows(self.rows, self.places[place])
        return self.rows[self.places[place]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; position p predicts token p + 1."""

    ids: list[str]
    documents: list[str]
    domains: list[str]
    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 1 where there is a token
    given: Tensor | None = None  # [B, T] bool, True where a token is context: not predicted
    positions: Tensor | None = None  # [B, T] int64, of packed rows: starts again with every part
    classes: Tensor | None = None  # [B] int64, of labelled rows: what the last token of each predicts

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes; attention starts again where positions do, padding included."""
        if self.positions is not None:
            return {"input_ids": self.input_ids, "position_ids": self.positions}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def labels(self) -> Tensor:
        """[B, T - 1] the token that each position predicts, or the class of its row."""
        following = self.input_ids[:, 1:]
        return following if self.classes is None else self.classes[:, None].expand_as(following)

    @cached_property
    def mask(self) -> Tensor:
        """[B, T - 1] bool, True where the predicted token is real and not given, or comes before a label."""
        real = self.attention_mask[:, 1:].bool()
        if self.classes is not None:
            return self.attention_mask[:, :-1].bool() & ~real
        return real if self.given is None else real & ~self.given[:, 1:]

    @cached_property
    def targets(self) -> tuple[Tensor, Tensor]:
        """[N] places among the B * T positions that predict a token under the mask; [N] those tokens."""
        rows, columns = self.mask.nonzero(as_tuple=True)
        return rows * self.input_ids.shape[1] + columns, self.labels[rows, columns]

    def to(self, device: torch.device | str) -> Batch:
        moved = self.input_ids.to(device), self.attention_mask.to(device)
        optional = self.given, self.positions, self.classes
        rest = [None if tensor is None else tensor.to(device) for tensor in optional]
        return Batch(self.ids, self.documents, self.domains, *moved, *rest)


def read_documents(data: Path, split: str) -> list[Document]:
    """Documents of one split or slice of the data artifact `data`, in the order of its file."""
    return list(stream_documents(data, split))


def stream_documents(data: Path, split: str) -> Iterator[Document]:
    """The same one by one: training documents may be more than fit into memory."""
    path = data / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in data.glob("*.jsonl"))) or "none"
        raise UserError(f"slice {split!r}", f"no {path}", f"slices of this data: {known}")
    with path.open(encoding="utf-8") as lines:
        yield from map(parse_document, lines)


def parse_document(line: str | bytes) -> Document:
    """The document in a line of a split's file."""
    row = json.loads(line)
    prompt, group, origin = row.get("prompt", ""), row.get("group", row["id"]), row.get("origin", "")
    rest = {name: row[name] for name in ("source", "tools", "calls", "label") if name in row}
    return Document(row["id"], row["domain"], row["text"], prompt, group, origin, **rest)


def text_lines(path: Path, thing: str, fix: str) -> Iterator[Line]:
    """The lines of a UTF-8 file that are not empty; `fix` says what the file should be.

    Raises:
        UserError: there is no such file, it is not UTF-8, or it is empty.
    """
    if not path.is_file():
        raise UserError(thing, f"no such file: {path}", fix)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{thing} {path}", "not UTF-8", "save it as UTF-8") from error
    numbered = enumerate(text.split("\n"), start=1)  # and not splitlines: JSON may hold U+2028
    numbered_lines = [(f"{path}, line {number}", number, line) for number, line in numbered if line.strip()]
    if not numbered_lines:
        raise UserError(f"{thing} {path}", "the file is empty", fix)
    yield from numbered_lines


def json_objects(path: Path, thing: str, fix: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """The same, each line a JSON object.

    Raises:
        UserError: as above, or a line is no JSON object.
    """
    for where, number, line in text_lines(path, thing, fix):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(where, f"not JSON ({error})", "write one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(
                where, f"expected a JSON object, found {type(row).__name__}", "write one JSON object a line"
            )
        yield where, number, row


def cluster_names(documents: Sequence[Document], kind: str, earlier: Collection[str] = ()) -> list[str]:
    """The cluster of each document of a slice: documents of one are not independent.

    A cluster is a `group`, a `domain` or a `source`; a file that lies in no folder has no domain in common
    with others; where all documents of the slice are of one, as with `none`, each is a cluster of its own.
    `earlier` are the clusters of documents of the slice that were seen before these.
    """
    alone = [document.id for document in documents]
    if kind == "none":
        return alone
    names = [str(getattr(document, kind)) or document.id for document in documents]
    if len({*names, *earlier}) == 1:
        return alone
    loose = kind == "domain"
    return [i if loose and name == NO_FOLDER else name for i, name in zip(alone, names, strict=True)]


def scored_slices(data: Path) -> list[str]:
    """Validation first, then the shifted slices; those trained on and the test documents are left out."""
    names = sorted(p.stem for p in data.glob("*.jsonl") if p.stem not in (TRAIN, VALIDATION, TEST, TRANSFER))
    return [VALIDATION, *names]


def part_of_test(name: str) -> str:
    """The slice of the test documents beside a slice: of a shifted one in a folder of its own."""
    return TEST if name == VALIDATION else f"{TEST}/{name}"


def slices_of_test(data: Path) -> list[str]:
    """The slices of the test documents: those like the training ones, then of shifted slices."""
    return [TEST, *sorted(part_of_test(path.stem) for path in (data / TEST).glob("*.jsonl"))]


def describe_data(facts: dict[str, Any]) -> list[str]:
    """What the manifest of a data artifact says of its sources, in sentences; of earlier versions nothing."""
    lines = []
    for name, rows in facts.get("rows", {}).items():
        reasons = facts["left_out"].get(name, {})
        ordered = sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0]))
        listed = ", ".join(f"{count} {reason}" for reason, count in ordered)
        line = (
            f"{'data' if name == 'documents' else name}: {rows - sum(reasons.values())} of {rows} rows used"
        )
        line = f"{line}; left out: {listed}" if listed else line
        empty = facts.get("empty_files", {}).get(name, 0)
        lines.append(f"{line}; beside them {empty} empty files" if empty else line)
    if "near_duplicates" in facts:
        lines.append(f"near-duplicates: {facts['near_duplicates']} documents, each on the side of its like")
    if any(count < facts[f"{name}_documents"] for name, count in facts.get("groups", {}).items()):
        parts = [f"{facts[f'{n}_documents']} {n} documents in {c}" for n, c in facts["groups"].items()]
        lines.append(f"groups: {', '.join(parts)}")
    return lines


def pad_id(tokenizer) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else boundary_id(tokenizer)


def windows(tokenizer, document: Document, context: int, learned: Learned = SCORED) -> list[Row]:
    """Rows that predict each token of the text once; see `eval.core.documents.encoding`."""
    (encoding,) = encode(tokenizer, [document], learned, context)
    return [
        Row(document.id, document.domain, i, tokens, given, (), skipped, document.label is not None)
        for i, window in enumerate(windows_of(encoding, context))
        for tokens, given, skipped in [window_tokens(encoding, window)]
    ]


def pack(rows: Sequence[Row], context: int) -> list[Row]:
    """Rows of one domain laid end to end, so that rows of `context` tokens are full.

    Each part keeps its boundary token, its positions and its attention to itself.
    """
    domains: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        domains.setdefault(row.domain, []).append(i)
    bins = [
        [places[i] for i in items]
        for places in domains.values()
        for items in best_fit([len(rows[i].tokens) for i in places], context)
    ]
    return [join_rows([rows[i] for i in places]) for places in sorted(bins)]


def join_rows(rows: list[Row]) -> Row:
    """Rows laid end to end in one."""
    if len(rows) == 1:
        return rows[0]
    first = rows[0]
    tokens = [token for row in rows for token in row.tokens]
    parts = tuple((len(row.tokens), row.given) for row in rows)
    starts = accumulate((size for size, _ in parts), initial=0)
    skipped = tuple(
        (start + a, start + b) for row, start in zip(rows, starts, strict=False) for a, b in row.skipped
    )
    return Row(first.document, first.domain, first.index, tokens, packed=parts, skipped=skipped)


def collate(rows: list[Row], pad: int) -> Batch:
    """Pads rows on the right with `pad`, under the mask; a label too, which no model may read."""
    import torch  # seconds to import: not before there are rows

    length = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    given = torch.zeros((len(rows), length), dtype=torch.bool)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.read)] = torch.tensor(row.read)
        mask[i, : len(row.read)] = 1
        start = 0
        for size, context in row.parts:
            given[i, start : start + 1 + context] = True
            positions[i, start : start + size] = torch.arange(size)
            start += size
        for first, end in row.skipped:
            given[i, first:end] = True
        positions[i, start:] = torch.arange(length - start)
    names = [r.id for r in rows], [r.document for r in rows], [r.domain for r in rows]
    packed = any(row.packed for row in rows)
    classes = torch.tensor([row.tokens[-1] for row in rows]) if rows[0].labelled else None
    return Batch(*names, ids, mask, given, positions if packed else None, classes)


def tokens_per_batch(vocabulary: int, device: torch.device | str = "cpu") -> int:
    """Padded tokens per batch: as many as the free memory of a device has room for the logits of, [T, V].

    In float32, and `COPIES` times over: they are copied. A CPU gives a `CPU_SHARE` of what is free, because
    several processes run on it. It is a power of two, so that it is mostly the same, and no more than help.
    """
    share, most = (CPU_SHARE, CPU_TOKENS) if str(device).startswith("cpu") else (1, CUDA_TOKENS)
    fits = free_bytes(device) // share // (COPIES * 4 * vocabulary)
    return min(most, 1 << max(0, fits.bit_length() - 1))


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Memory that a process can still have: of this machine, or of a GPU."""
    if str(device).startswith("cpu"):
        return int(psutil.virtual_memory().available)
    import torch  # seconds to import

    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def batches(rows: Iterable[Row], pad: int, batch_tokens: int = 4096) -> Iterator[Batch]:
    """Batches of rows of like length, the longest first, each of at most `batch_tokens` padded tokens.

    Of rows that are read when they are asked for, no more than a batch is held.
    """
    batch: list[Row] = []
    every = rows if isinstance(rows, Sequence) else list(rows)
    keys = [(-len(row.tokens), row.id) for row in every]
    for place in sorted(range(len(every)), key=keys.__getitem__):
        row = every[place]
        if batch and len(batch[0].tokens) * (len(batch) + 1) > batch_tokens:
            yield collate(batch, pad)
            batch = []
        batch.append(row)
    if batch:
        yield collate(batch, pad)
