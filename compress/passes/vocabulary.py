"""Vocabulary: the tokens that no training document has are dropped from the tokenizer and from the model.

What the documents are split into stays the same, special tokens and single bytes or characters stay, and
the model gives the kept tokens their probabilities, scaled to sum to 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

import torch

from compress.calibration import check_batch, check_same_answers, log_probs
from compress.model_size import size_of
from compress.recipe import Context, Pass, PassReport, Stage
from compress.vocabulary import check_round_trip, needed_ids, used_ids, without_tokens, write_tokenizer
from compress.width import cut, find_axes, size_in_config
from eval.core.documents import Row
from eval.engines import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER, KEPT = "vocabulary", "kept.json"  # in scratch: the new tokenizer, and beside it the ids that it keeps


class Vocabulary(Pass):
    stage = Stage.STRUCTURE

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        before, (kept, tokenizer) = size_of(model, context.dtype), smaller_tokenizer(context)
        rows = size_in_config(model, "vocabulary")
        tokens = len(context.tokenizer)
        if len(kept) < rows:
            whole, model = model, keep_tokens(model, kept)
            check_same(whole, model, context, kept)
        facts = {
            "vocabulary": [rows, size_in_config(model, "vocabulary")],
            "tokens": [tokens, len(tokenizer)],
        }
        after = size_of(model, context.dtype)
        return model, PassReport(name=self.name, before=before, after=after, facts=facts)

    def next_context(self, context: Context) -> Context:
        kept, tokenizer = smaller_tokenizer(context)
        if len(kept) == size_in_config(context.parent, "vocabulary"):
            return context
        place = {old: new for new, old in enumerate(kept)}
        return replace(
            context,
            parent=keep_tokens(context.parent, kept),
            tokenizer=tokenizer,
            rows=RenumberedRows(context.rows, place),
            pad=place[context.pad],
        )


def smaller_tokenizer(context: Context) -> tuple[list[int], PreTrainedTokenizerBase]:
    """The ids that stay, ascending, and the tokenizer without the others: made once, then read again.

    Raises:
        UserError: it splits a training document otherwise.
    """
    folder = context.scratch / FOLDER
    if not folder.is_dir():
        old = context.tokenizer
        content = json.loads(old.backend_tokenizer.to_str())
        named = named_ids(context.parent) | {context.pad, *old.all_special_ids}
        kept = needed_ids(content, used_ids(old, context.documents()) | named)
        with TemporaryDirectory(dir=context.scratch) as temporary:
            write_tokenizer(old, without_tokens(content, kept), Path(temporary) / FOLDER)
            new = load_tokenizer(Path(temporary) / FOLDER)
            check_round_trip(old, new, kept, context.documents())
            (Path(temporary) / FOLDER / KEPT).write_text(json.dumps(kept))
            (Path(temporary) / FOLDER).rename(folder)
    rows = size_in_config(context.parent, "vocabulary")
    kept = json.loads((folder / KEPT).read_text())
    return [i for i in kept if i < rows], load_tokenizer(folder)


def named_ids(model: PreTrainedModel) -> set[int]:
    """The ids that the configs of a model name, such as those that end a text."""
    named = [*_fields(model.config.get_text_config()).values(), *_fields(model.generation_config).values()]
    return {i for value in named for i in (value if isinstance(value, list) else [value])}


def _fields(config: Any) -> dict[str, Any]:
    """The fields of a config that hold ids of tokens."""
    held = {} if config is None else config.to_dict()
    return {k: v for k, v in held.items() if k.endswith("token_id") and v is not None}


def keep_tokens(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """The model with the rows of the ids `kept` alone, and its configs' ids renumbered; a copy."""
    place = {old: new for new, old in enumerate(kept)}

    def renumbered(config: Any) -> dict[str, Any]:
        return {
            name: [place[i] for i in value] if isinstance(value, list) else place.get(value)
            for name, value in _fields(config).items()
        }

    fields = renumbered(model.config.get_text_config())
    config, axes = find_axes(model, "vocabulary", len(kept), **fields)
    small = cut(model, config, axes, {"": torch.tensor(kept)})
    for name, value in renumbered(small.generation_config).items():
        setattr(small.generation_config, name, value)
    return small


def check_same(whole: PreTrainedModel, small: PreTrainedModel, context: Context, kept: list[int]) -> None:
    """Compares both models on the tokens that both have; see `check_same_answers`."""
    batch = check_batch(context.rows, context.pad)
    place = {old: new for new, old in enumerate(kept)}
    ids = torch.tensor([[place[i] for i in row] for row in batch.input_ids.tolist()])
    real = batch.attention_mask.bool()
    before = log_probs(whole, batch)[real][:, kept].log_softmax(-1)
    after = log_probs(small, replace(batch, input_ids=ids))[real]
    check_same_answers(whole, batch, before, after, "vocabulary")


class RenumberedRows(Sequence[Row]):
    """Rows with other ids, each renumbered when it is asked for."""

    def __init__(self, rows: Sequence[Row], place: dict[int, int]) -> None:
        self.rows, self.place = rows, place

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> RenumberedRows: ...
    def __getitem__(self, place: int | slice) -> Row | RenumberedRows:
        if isinstance(place, slice):
            return RenumberedRows(self.rows[place], self.place)
        row = self.rows[place]
        return replace(row, tokens=[self.place[token] for token in row.tokens])
