"""Documents of a data artifact, and the rows of tokens that every stage makes of them in the same way."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eval.errors import UserError
from eval.records import HELDOUT

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TRAIN, SEALED = "train", "sealed"


@dataclass(frozen=True)
class Document:
    id: str
    domain: str
    text: str

    @property
    def bytes(self) -> int:
        return len(self.text.encode())


@dataclass(frozen=True)
class Row:
    """A window of one document: the boundary token, then up to context - 1 tokens of text."""

    document: str  # id
    domain: str
    index: int  # of the window in its document
    tokens: list[int]

    @property
    def id(self) -> str:
        return f"{self.document}#{self.index}"


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right; position p predicts token p + 1."""

    ids: list[str]
    documents: list[str]
    domains: list[str]
    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 1 where there is a token

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def labels(self) -> Tensor:
        """[B, T - 1] the token that each position predicts."""
        return self.input_ids[:, 1:]

    @property
    def mask(self) -> Tensor:
        """[B, T - 1] bool, True where the predicted token is real."""
        return self.attention_mask[:, 1:].bool()

    def to(self, device: torch.device | str) -> Batch:
        moved = self.input_ids.to(device), self.attention_mask.to(device)
        return Batch(self.ids, self.documents, self.domains, *moved)


def read_documents(data: Path, split: str) -> list[Document]:
    """Documents of one split or slice of the data artifact `data`, in the order of its file."""
    path = data / f"{split}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in data.glob("*.jsonl"))) or "none"
        raise UserError(f"slice {split!r}", f"no {path}", f"slices of this data: {known}")
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Document(row["id"], row["domain"], row["text"]) for row in rows]


def scored_slices(data: Path) -> list[str]:
    """Held-out first, then the shifted slices; the training and the sealed documents are left out."""
    names = sorted(p.stem for p in data.glob("*.jsonl") if p.stem not in (TRAIN, HELDOUT, SEALED))
    return [HELDOUT, *names]


def boundary_id(tokenizer) -> int:
    """The token that every row starts with: BOS, or EOS where a tokenizer has no BOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise UserError("tokenizer", "neither BOS nor EOS token", "set one of the two in its config")


def windows(tokenizer, document: Document, context: int) -> list[Row]:
    """Rows that cover the document, each token once; nothing is dropped."""
    tokens = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    if not tokens:
        raise UserError(f"document {document.id!r}", "no tokens", "drop empty documents")
    first, step = boundary_id(tokenizer), context - 1
    return [
        Row(document.id, document.domain, i, [first, *tokens[start : start + step]])
        for i, start in enumerate(range(0, len(tokens), step))
    ]


def collate(rows: list[Row], pad: int) -> Batch:
    """Pads rows on the right with `pad`, under the mask."""
    import torch  # seconds to import: not before there are rows

    length = max(len(row.tokens) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, : len(row.tokens)] = 1
    return Batch([r.id for r in rows], [r.document for r in rows], [r.domain for r in rows], ids, mask)


def tokens_per_batch(vocabulary: int) -> int:
    """Padded tokens per batch whose logits take at most 128 MiB in float32, and no more than help a CPU."""
    return min(4096, max(1, 2**25 // vocabulary))


def batches(rows: Iterable[Row], pad: int, batch_tokens: int = 4096) -> Iterator[Batch]:
    """Batches of rows of like length, the longest first, each of at most `batch_tokens` padded tokens."""
    held: list[Row] = []
    for row in sorted(rows, key=lambda r: (-len(r.tokens), r.id)):
        if held and len(held[0].tokens) * (len(held) + 1) > batch_tokens:
            yield collate(held, pad)
            held = []
        held.append(row)
    if held:
        yield collate(held, pad)
