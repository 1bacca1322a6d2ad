"""Documents of a data artifact, and the rows of tokens that every stage makes of them in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.core.errors import UserError
from eval.core.records import VALIDATION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRAIN, TEST = "train", "test"
DAY = datetime(2024, 7, 26)  # for chat templates that print one: rows must be the same tomorrow


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

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Row:
    """A window of one document: the boundary token, then up to context - 1 tokens; or several, packed."""

    document: str  # id
    domain: str
    index: int  # of the window in its document
    tokens: list[int]
    given: int = 0  # so many tokens after the boundary are context and not predicted
    packed: tuple[tuple[int, int], ...] = ()  # of several rows in one: their lengths and what is given

    @property
    def id(self) -> str:
        more = f"+{len(self.packed) - 1}" if self.packed else ""
        return f"{self.document}#{self.index}{more}"

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Length and number of given tokens of every row in this one."""
        return self.packed or ((len(self.tokens), self.given),)

    @property
    def predicted(self) -> int:
        """Number of tokens that are learned or scored."""
        return sum(length - 1 - given for length, given in self.parts)


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

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes; attention starts again where positions do, padding included."""
        if self.positions is not None:
            return {"input_ids": self.input_ids, "position_ids": self.positions}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def labels(self) -> Tensor:
        """[B, T - 1] the token that each position predicts."""
        return self.input_ids[:, 1:]

    @cached_property
    def mask(self) -> Tensor:
        """[B, T - 1] bool, True where the predicted token is real and not given."""
        real = self.attention_mask[:, 1:].bool()
        return real if self.given is None else real & ~self.given[:, 1:]

    @cached_property
    def targets(self) -> tuple[Tensor, Tensor]:
        """[N] places among the B * T positions that predict a token under the mask; [N] those tokens."""
        rows, columns = self.mask.nonzero(as_tuple=True)
        places = rows * self.input_ids.shape[1] + columns
        return places, self.input_ids.flatten()[places + 1]

    def to(self, device: torch.device | str) -> Batch:
        moved = self.input_ids.to(device), self.attention_mask.to(device)
        rest = [None if tensor is None else tensor.to(device) for tensor in (self.given, self.positions)]
        return Batch(self.ids, self.documents, self.domains, *moved, *rest)


def read_documents(data: Path, split: str) -> list[Document]:
    """Documents of one split or slice of the data artifact `data`, in the order of its file."""
    path = data / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in data.glob("*.jsonl"))) or "none"
        raise UserError(f"slice {split!r}", f"no {path}", f"slices of this data: {known}")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [
        Document(
            row["id"],
            row["domain"],
            row["text"],
            row.get("prompt", ""),
            row.get("group", row["id"]),
            row.get("origin", ""),
        )
        for row in rows
    ]


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
        except ValueError as error:
            raise UserError(where, f"not JSON ({error})", "write one JSON object a line") from error
        if not isinstance(row, dict):
            raise UserError(
                where, f"expected a JSON object, found {type(row).__name__}", "write one JSON object a line"
            )
        yield where, number, row


def scored_slices(data: Path) -> list[str]:
    """Validation first, then the shifted slices; the training and the test documents are left out."""
    names = sorted(p.stem for p in data.glob("*.jsonl") if p.stem not in (TRAIN, VALIDATION, TEST))
    return [VALIDATION, *names]


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
        lines.append(f"{line}; left out: {listed}" if listed else line)
    if "near_duplicates" in facts:
        lines.append(f"near-duplicates: {facts['near_duplicates']} documents, each on the side of its like")
    if any(count < facts[f"{name}_documents"] for name, count in facts.get("groups", {}).items()):
        parts = [f"{facts[f'{n}_documents']} {n} documents in {c}" for n, c in facts["groups"].items()]
        lines.append(f"groups: {', '.join(parts)}")
    return lines


def boundary_id(tokenizer) -> int:
    """The token that every row starts with: BOS, or EOS where a tokenizer has no BOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("tokenizer", "neither BOS nor EOS token", "set one of the two in its config")


def pad_id(tokenizer) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else boundary_id(tokenizer)


def texts(tokenizer, document: Document) -> tuple[str, str]:
    """Prompt and text as the model reads them: a chat goes through the tokenizer's own template.

    The text of a chat is its last answer with what the template writes after it, such as an end of turn.
    """
    if isinstance(document.prompt, str):
        return document.prompt, document.text
    if tokenizer.chat_template is None:
        fix = "take an instruction-tuned base, or give a prompt column in place of messages"
        raise UserError(f"document {document.id!r}", "a chat, and the tokenizer has no chat template", fix)
    answer = {"role": "assistant", "content": document.text}
    turns = [*document.prompt, answer]
    read = partial(tokenizer.apply_chat_template, tokenize=False, strftime_now=DAY.strftime)
    before, whole = read(document.prompt, add_generation_prompt=True), read(turns)
    if not whole.startswith(before):
        problem = f"the chat template rewrites what came before {answer['content'][:20]!r}"
        raise UserError(f"document {document.id!r}", problem, "give a prompt column in place of messages")
    return before, whole[len(before) :]


def windows(tokenizer, document: Document, context: int) -> list[Row]:
    """Rows that predict each token of the text once; nothing is dropped.

    A row of a document with a prompt starts with what came just before its share of the text, in at most
    half of its places.
    """
    prompt, text = texts(tokenizer, document)
    before, tokens = (
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (prompt, text)
    )
    if not tokens:
        raise UserError(f"document {document.id!r}", "no tokens", "drop empty documents")
    first = boundary_id(tokenizer)
    before = before[1:] if before[:1] == [first] else before
    given = min(len(before), (context - 1) // 2)
    if len(before) + len(tokens) < context:
        given = len(before)
    every, step = before + tokens, context - 1 - given
    return [
        Row(document.id, document.domain, i, [first, *every[start - given : start + step]], given)
        for i, start in enumerate(range(len(before), len(every), step))
    ]


def pack(rows: Iterable[Row], context: int) -> Iterator[Row]:
    """Rows of one domain laid end to end while they fit; of two that do not, the fuller one goes out.

    Each part keeps its boundary token, its positions and its attention to itself.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group = groups.setdefault(row.domain, [])
        length = sum(len(r.tokens) for r in group)
        if length + len(row.tokens) <= context:
            group.append(row)
        elif len(row.tokens) >= length:
            yield row
        else:
            yield _joined(group)
            groups[row.domain] = [row]
    yield from (_joined(group) for group in groups.values() if group)


def _joined(rows: list[Row]) -> Row:
    if len(rows) == 1:
        return rows[0]
    first = rows[0]
    tokens = [token for row in rows for token in row.tokens]
    parts = tuple((len(row.tokens), row.given) for row in rows)
    return Row(first.document, first.domain, first.index, tokens, packed=parts)


def collate(rows: list[Row], pad: int) -> Batch:
    """Pads rows on the right with `pad`, under the mask."""
    import torch  # seconds to import: not before there are rows

    length = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    given = torch.zeros((len(rows), length), dtype=torch.bool)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, : len(row.tokens)] = 1
        start = 0
        for size, context in row.parts:
            given[i, start : start + 1 + context] = True
            positions[i, start : start + size] = torch.arange(size)
            start += size
        positions[i, start:] = torch.arange(length - start)
    names = [r.id for r in rows], [r.document for r in rows], [r.domain for r in rows]
    packed = any(row.packed for row in rows)
    return Batch(*names, ids, mask, given, positions if packed else None)


def tokens_per_batch(vocabulary: int) -> int:
    """Padded tokens per batch whose logits take at most 128 MiB in float32, and no more than help a CPU."""
    return min(4096, max(1, 2**25 // vocabulary))


def batches(rows: Iterable[Row], pad: int, batch_tokens: int = 4096) -> Iterator[Batch]:
    """Batches of rows of like length, the longest first, each of at most `batch_tokens` padded tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda r: (-len(r.tokens), r.id)):
        if batch and len(batch[0].tokens) * (len(batch) + 1) > batch_tokens:
            yield collate(batch, pad)
            batch = []
        batch.append(row)
    if batch:
        yield collate(batch, pad)
