"""A text in front of every row: run once, its keys and values reused by every batch."""

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from distill.models.generation import refuse_packing
from distill.models.lm_head import capture_input, output_embedding
from distill.models.rounding import ROUNDINGS_ALLOWED, rounding_noise
from eval.core.config import Frozen
from eval.core.documents import Batch, boundary_id
from eval.core.documents.encoding import text_ids
from eval.core.errors import UserError

REUSABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # keys and values that grow, and that nothing overwrites
PROBE = 4  # tokens after the prefix on which reuse is compared with the whole text


class Text(Frozen):
    """A text, or the file that holds it."""

    text: str | None = Field(None, min_length=1, description="the text itself")
    file: Path | None = Field(None, description="a UTF-8 file that holds the text")

    @model_validator(mode="after")
    def one_origin(self) -> Self:
        if (self.text is None) == (self.file is None):
            raise ValueError("give exactly one of `text` and `file`")
        return self

    def read(self) -> str:
        if self.file is None:
            return str(self.text)
        fix = "give a UTF-8 text that is not empty"
        try:
            text = self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("method.settings: file", f"{self.file} cannot be read ({error})", fix) from error
        if not text:
            raise UserError("method.settings: file", f"{self.file} is empty", fix)
        return text


def front_ids(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None = None) -> list[int]:
    """The boundary token, then the tokens of a text, at most so many of them."""
    return [boundary_id(tokenizer), *text_ids(tokenizer, text)[:most]]


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens in front of a row, and what a model keeps of them."""

    ids: Tensor  # [P] int64; without a cache also [B, P], of each row its own
    cache: (
        DynamicCache | None
    )  # of one row; None: reuse is not exact in this family, so they run with each row
    reader: PreTrainedModel | None = None  # whose cache it is: other models run the tokens

    def expanded(self, rows: int) -> DynamicCache:
        """The cache for so many rows: views, which a forward pass extends without changing the original."""
        assert self.cache is not None
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for layer in cache.layers:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
        return cache


@torch.no_grad()
def read_prefix(model: PreTrainedModel, ids: Sequence[int]) -> Prefix:
    """Runs a model over the tokens in front of every row, once.

    Reuse is tried on a few tokens: a family whose states are not keys and values alone (state spaces), or
    whose answers differ from those of the whole text by more than rounding explains in this model, runs the
    whole text with every row instead, and a line says so.
    """
    tokens = torch.tensor(list(ids), dtype=torch.int64, device=model.device)
    with capture_input(output_embedding(model)):
        kept = getattr(model(input_ids=tokens[None], use_cache=True), "past_key_values", None)
    whole, kind = Prefix(tokens, None), model.config.model_type
    if not isinstance(kept, DynamicCache) or any(type(layer) not in REUSABLE for layer in kept.layers):
        _tell(f"a {kind} keeps other states than keys and values")
        return whole
    reused, probe = Prefix(tokens, kept, model), tokens[:PROBE].expand(2, -1)
    mask = torch.ones_like(probe)
    mask[1, 1:] = 0  # a row of one token, padded

    def states(prefix: Prefix) -> Tensor:
        return _run(model, probe, mask, prefix)[mask.bool()].float()

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).norm() / other.norm())

    answer = states(whole)
    error = distance(states(reused), answer)
    allowed = ROUNDINGS_ALLOWED * rounding_noise(model, lambda: states(whole), answer, distance)
    if error <= allowed:
        return reused
    _tell(f"a {kind} answers otherwise with its keys and values ({error:.2g} apart, rounding: {allowed:.2g})")
    return whole


@cache
def _tell(reason: str) -> None:
    """Tells once for each reason why a text in front is not run once."""
    print(f"the text in front runs with every row, which takes longer: {reason}", file=sys.stderr)


def hidden_after(model: PreTrainedModel, batch: Batch, prefixes: Sequence[Prefix | None]) -> Tensor:
    """[B, T, D] last hidden states of a batch, each row after the tokens of its prefix.

    Equal to those of the whole text up to rounding. A packed row's documents come after the prefix each.

    Args:
        prefixes: one for each row; None: nothing stands in front.
    """
    first = prefixes[0]
    if batch.positions is None and all(prefix is first for prefix in prefixes):
        return _run(model, batch.input_ids, batch.attention_mask, first)
    parts: dict[int, list[tuple[int, int, int]]] = {}
    for row, start, end in _parts(batch):
        parts.setdefault(id(prefixes[row]), []).append((row, start, end))
    hidden: Tensor | None = None
    for group in parts.values():
        length = max(end - start for _, start, end in group)
        ids = batch.input_ids.new_zeros(len(group), length)
        mask = torch.zeros_like(ids)
        for i, (row, start, end) in enumerate(group):
            ids[i, : end - start] = batch.input_ids[row, start:end]
            mask[i, : end - start] = 1
        states = _run(model, ids, mask, prefixes[group[0][0]])
        if hidden is None:
            hidden = states.new_zeros(*batch.input_ids.shape, states.shape[-1])
        for i, (row, start, end) in enumerate(group):
            hidden[row, start:end] = states[i, : end - start]
    assert hidden is not None
    return hidden


def put_in_front(batch: Batch, prefixes: Sequence[Prefix | None]) -> Iterator[tuple[list[int], Batch, int]]:
    """Rows with the tokens of their prefixes: numbers of rows, a batch of them, and how many stand in front.

    Raises:
        UserError: rows are packed.
    """
    refuse_packing(batch.positions is not None, "a chain puts text in front of one document at a time")
    sizes = [0 if prefix is None else prefix.ids.shape[-1] for prefix in prefixes]
    for size in dict.fromkeys(sizes):
        rows = [row for row, own in enumerate(sizes) if own == size]
        ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
        fronts = ids.new_zeros(len(rows), size)
        for place, row in enumerate(rows):
            if (prefix := prefixes[row]) is not None:
                fronts[place] = prefix.ids if prefix.ids.ndim == 1 else prefix.ids[row]
        longer = Batch(
            [batch.ids[row] for row in rows],
            [batch.documents[row] for row in rows],
            [batch.domains[row] for row in rows],
            torch.cat([fronts, ids], 1),
            torch.cat([torch.ones_like(fronts), mask], 1),
        )
        yield rows, longer, size


def _parts(batch: Batch) -> list[tuple[int, int, int]]:
    """(row, start, end) of every document in a batch."""
    parts = []
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        starts = [0]
        if batch.positions is not None:
            starts = (batch.positions[row, :length] == 0).nonzero()[:, 0].tolist()
        parts += [(row, start, end) for start, end in zip(starts, [*starts[1:], length], strict=True)]
    return parts


def _run(model: PreTrainedModel, ids: Tensor, mask: Tensor, prefix: Prefix | None) -> Tensor:
    """[B, T, D] last hidden states of rows of `ids` [B, T] that are padded on the right."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    size = 0 if prefix is None else prefix.ids.shape[-1]
    if prefix is not None:
        inputs["attention_mask"] = torch.cat([mask.new_ones(len(ids), size), mask], dim=1)
        if prefix.cache is None or prefix.reader is not model:
            inputs["input_ids"] = torch.cat([prefix.ids.expand(len(ids), -1), ids], dim=1)
        else:
            inputs["past_key_values"] = prefix.expanded(len(ids))
    with capture_input(output_embedding(model)) as captured:
        model(**inputs, use_cache="past_key_values" in inputs)
    return captured[0][:, -ids.shape[1] :]
