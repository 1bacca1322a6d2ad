"""The training rows of a study: read from the token map when they are asked for, one by one."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.data.tokens import NO_FRONT, make_tokens
from eval.core.artifacts import read_manifest
from eval.core.documents import TRAIN, TRANSFER, ChosenRows, Document, Row, join_rows, stream_documents
from eval.core.errors import UserError
from eval.core.study import Study


class TokenMap(Sequence[Row]):
    """The rows in a folder of tokens, mapped into memory; see `distill.data.tokens`."""

    def __init__(self, folder: Path) -> None:
        facts = read_manifest(folder).facts
        self.ids = np.memmap(folder / "ids.bin", dtype=facts["type"], mode="r")
        self.labelled = facts.get("labelled", False)
        self.names = np.memmap(folder / "names.bin", dtype=np.uint8, mode="r")
        self.table = np.load(folder / "rows.npy", mmap_mode="r")
        self.order = np.load(folder / "order.npy", mmap_mode="r")
        self.documents = np.load(folder / "documents.npy", mmap_mode="r")
        self.domains: list[str] = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
        ends, skipped, sources = (folder / f"{name}.npy" for name in ("ends", "skipped", "sources"))
        self.sources = np.load(sources, mmap_mode="r") if sources.is_file() else None  # of each document
        self.ends = np.load(ends, mmap_mode="r") if ends.is_file() else None  # of the parts of packed rows
        self.skipped = np.load(skipped, mmap_mode="r") if skipped.is_file() else None  # [K, 2] spans of ids

    def __len__(self) -> int:
        """Number of rows, packed ones where they are packed."""
        return len(self.order if self.ends is None else self.ends)

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """The numbers in `table` of the rows from `start` to `stop`, or of their parts."""
        if self.ends is None:
            return self.order[start:stop]
        return self.order[self.ends[start - 1] if start else 0 : self.ends[stop - 1] if stop else 0]

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> ChosenRows: ...
    def __getitem__(self, place: int | slice) -> Row | ChosenRows:
        if isinstance(place, slice):
            return ChosenRows(self, range(len(self))[place])
        return join_rows([self._part(number) for number in self.numbers(place, place + 1).tolist()])

    def _part(self, number: int) -> Row:
        document, index, start, size, given, front, _ = self.table[number].item()
        name_start = self.documents[document - 1]["name_end"] if document else 0
        name_end, domain = self.documents[document].item()
        name = self.names[name_start:name_end].tobytes().decode()
        tokens = self.ids[start : start + size].tolist()
        skipped = self._skipped(start, size, given + (front == NO_FRONT))
        if front != NO_FRONT:
            tokens.insert(0, front)
            skipped = tuple((first + 1, end + 1) for first, end in skipped)
        return Row(name, self.domains[domain], index, tokens, given, (), skipped, self.labelled)

    def _skipped(self, start: int, size: int, given: int) -> tuple[tuple[int, int], ...]:
        """Spans of ids from `start` that are only read, after the `given` first ones."""
        if self.skipped is None:
            return ()
        first = np.searchsorted(self.skipped[:, 1], start + given, side="right")
        last = np.searchsorted(self.skipped[:, 0], start + size)
        spans = (self.skipped[first:last] - start).tolist()
        return tuple((max(begin, given), min(end, size)) for begin, end in spans)

    def predicted(self, start: int, stop: int) -> int:
        """Number of tokens that rows predict."""
        return int(self.table["predicted"][self.numbers(start, stop)].sum())

    def tokens_by_source(self, start: int, stop: int) -> list[int]:
        """The same of each source; empty where sources have no weights."""
        if self.sources is None:
            return []
        numbers = self.numbers(start, stop)
        sources = self.sources[self.table["document"][numbers]]
        return np.bincount(sources, self.table["predicted"][numbers]).astype(int).tolist()


def distilled_split(study: Study) -> str:
    """The documents on which students learn from their teachers."""
    return TRANSFER if study.data.transfer else TRAIN


def training_documents(study: Study) -> Iterator[Document]:
    """All documents that bases, teachers and students learn from, one by one."""
    for split in dict.fromkeys([TRAIN, distilled_split(study)]):
        yield from stream_documents(study.folder / "data", split)


def training_rows(study: Study, tokenizer: PreTrainedTokenizerBase, split: str = TRAIN) -> ChosenRows:
    """`data.train_rows` rows, spread over the documents of a split by hash; packed where the study says so.

    Each is read from the map when it is asked for: the list of them holds no tokens.

    Raises:
        UserError: the documents have fewer.
    """
    tokens = TokenMap(make_tokens(study, tokenizer, split, verify=False))
    return tokens[: _count(study, tokens, split)]


def _count(study: Study, tokens: TokenMap, split: str) -> int:
    wanted = study.data.train_rows
    if wanted == "all":
        return len(tokens)
    if wanted > len(tokens):
        whose = "the training documents have" if split == TRAIN else "data.transfer has"
        whose = "the mixture by data weights has" if tokens.sources is not None else whose
        problem = f"{wanted}, but {whose} {len(tokens)} rows"
        raise UserError("data.train_rows", problem, "lower it, give `all`, or add documents")
    return wanted


def rows_taken(study: Study, tokenizer: PreTrainedTokenizerBase, split: str = TRAIN) -> dict[str, Any]:
    """How many rows and predicted tokens a study takes of those that the documents of a split have."""
    tokens = TokenMap(make_tokens(study, tokenizer, split, verify=False))
    taken, every = _count(study, tokens, split), len(tokens)
    by_source = tokens.tokens_by_source(0, taken)
    return {
        "rows": taken,
        "of_rows": every,
        "tokens": tokens.predicted(0, taken),
        "of_tokens": tokens.predicted(0, every),
        **({"tokens_by_source": by_source} if by_source else {}),
    }


def describe_rows(taken: dict[str, Any], split: str = TRAIN) -> str:
    """The same in a line."""
    shares = [f"{tokens / taken['tokens']:.1%}" for tokens in taken.get("tokens_by_source", [])]
    mixture = f"; by source {', '.join(shares)} of the tokens" if shares else ""
    name = "training" if split == TRAIN else split
    return (
        f"{name} rows: {taken['rows']:,} of {taken['of_rows']:,}, with {taken['tokens']:,} of "
        f"{taken['of_tokens']:,} tokens ({taken['tokens'] / taken['of_tokens']:.1%}){mixture}"
    )
