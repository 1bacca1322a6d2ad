"""A memory of what followed similar moments: in a datastore of training text, and in the row itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from distill.method import Card, Method, MethodContext, TeacherOutput, plain_output
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, Row, batches, pad_id, tokens_per_batch
from eval.core.errors import UserError

KEYS, VALUES, PLACES, DOCUMENTS = "keys.npy", "values.npy", "documents.npy", "documents.json"
QUERIES = 256  # searched at a time: distances to every key are held for so many


@dataclass(frozen=True)
class Datastore:
    """M moments of training text."""

    keys: Tensor  # [M, D] float32, the last hidden state after which it came
    values: Tensor  # [M] int64, the token that came
    places: Tensor  # [M] int64, the document that it is of, as a number
    documents: dict[str, int]  # its numbers


def nearest(keys: Tensor, queries: Tensor, barred: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared Euclidean distances [N, K] and numbers [N, K] of the nearest keys, the nearest first; exact.

    Args:
        keys: [M, D] float32; queries: [N, D] float32.
        barred: [N, M] bool, True where a key must not be found: its distance is infinite.
    """
    distances = keys.square().sum(-1) - 2 * queries @ keys.mT + queries.square().sum(-1, keepdim=True)
    closest = (
        distances.clamp_min_(0).masked_fill_(barred, torch.inf).topk(min(count, len(keys)), largest=False)
    )
    return closest.values, closest.indices


def votes(weights: Tensor, tokens: Tensor, vocabulary: int) -> Tensor:
    """[..., V] probabilities of tokens [..., K] that have logits `weights` [..., K]; all zero if none counts.

    An entry of -inf does not count.
    """
    shares = weights.softmax(-1).nan_to_num(0.0)
    return shares.new_zeros(*shares.shape[:-1], vocabulary).scatter_add_(-1, tokens, shares)


class Memory(Method):
    card = Card(
        title="Memory",
        paper="kNN-LM: Khandelwal et al. 2020, arXiv:1911.00172; continuous cache: Grave, Joulin and Usunier "
        "2017, arXiv:1612.04426",
        claim="what followed similar moments, elsewhere or earlier in this text, is likely to follow again",
        touches="the output: distributions of remembered tokens are mixed in",
        limits="an exact search through every key: a large datastore is slow; what has to be looked up in it "
        "may be too much for the weights of a student",
    )

    class Settings(Frozen):
        share: float = Field(0.25, ge=0, lt=1, description="of the datastore in the mixture; 0: none is made")
        neighbours: int = Field(64, gt=0, description="moments that are remembered at a time")
        temperature: float = Field(1.0, gt=0, description="divides squared distances")
        cache_share: float = Field(0.0, ge=0, lt=1, description="of the row's own past in the mixture")
        flatness: float = Field(0.3, ge=0, description="factor of the products of hidden states in the cache")
        shuffled: bool = Field(
            False, description="remember tokens that came at other moments, and match none in the cache"
        )

        @model_validator(mode="after")
        def shares_leave_some(self) -> Self:
            if not 0 < self.share + self.cache_share < 1:
                raise ValueError("`share` and `cache_share` together must lie between 0 and 1")
            return self

    def control(self) -> Method:
        """The same keys with the values of others; in the cache every past token counts the same."""
        return Memory(self.settings.model_copy(update={"shuffled": True}))

    @property
    def fits(self) -> bool:
        return self.settings.share > 0

    def fit(self, context: MethodContext) -> None:
        """Writes the datastore: a key and a value for every token that the training rows predict."""
        if not self.fits:
            return
        model, rows = context.load_base(context.seed), context.rows()
        _refuse_packing(any(row.packed for row in rows))
        total, width = sum(row.predicted for row in rows), model.config.get_text_config().hidden_size
        keys = np.lib.format.open_memmap(context.folder / KEYS, "w+", np.float32, (total, width))
        values, places = np.zeros(total, np.int64), np.zeros(total, np.int64)
        documents, start = _numbers(rows), 0
        size = tokens_per_batch(model.config.get_text_config().vocab_size)
        for batch in batches(rows, pad_id(context.tokenizer), size):
            moved = batch.to(model.device)
            with torch.no_grad():
                hidden = plain_output(model, batch=moved).hidden[0][:, :-1][moved.mask]
            end = start + len(hidden)
            keys[start:end] = hidden.float().cpu().numpy()
            values[start:end] = batch.labels[batch.mask].numpy()
            numbers = torch.tensor([documents[name] for name in batch.documents])
            places[start:end] = numbers.repeat_interleave(batch.mask.sum(1)).numpy()
            start = end
        keys.flush()
        if self.settings.shuffled:
            np.random.default_rng(context.seed).shuffle(values)
        np.save(context.folder / VALUES, values)
        np.save(context.folder / PLACES, places)
        write_text(context.folder / DOCUMENTS, json.dumps(documents))

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> Datastore | None:
        if not self.fits:
            return None
        keys, values, places = (
            torch.from_numpy(np.load(context.folder / name)).to(teacher.device)
            for name in (KEYS, VALUES, PLACES)
        )
        documents = json.loads((context.folder / DOCUMENTS).read_text(encoding="utf-8"))
        return Datastore(keys, values, places, documents)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """Tokens of the row's own document are never found in the datastore."""
        _refuse_packing(batch.positions is not None)
        output = self.model_output(teacher, batch)
        if len(output.hidden) != 1:
            problem = "needs the states of one model, and the methods before it in the chain give none"
            raise UserError("method memory", problem, "put it before those that mix distributions")
        hidden, plain = output.hidden[0].float(), output.dense().exp()
        mixed, left = torch.zeros_like(plain), torch.ones_like(plain[..., :1])
        for share, remembered in (
            (self.settings.share, self._from_datastore(hidden, batch, plain.shape[-1])),
            (self.settings.cache_share, self._from_cache(hidden, batch, plain.shape[-1])),
        ):
            if remembered is not None:
                mixed += share * remembered
                left -= share * remembered.sum(-1, keepdim=True)  # where nothing is remembered it keeps all
        return TeacherOutput((left * plain + mixed).log())

    def _from_datastore(self, hidden: Tensor, batch: Batch, vocabulary: int) -> Tensor | None:
        """[B, T, V] probabilities of what followed the nearest moments of other documents."""
        if self.parts is None:
            return None
        store: Datastore = self.parts
        own = torch.tensor([store.documents.get(name, -1) for name in batch.documents], device=hidden.device)
        valid = batch.attention_mask.bool()
        queries, own = hidden[valid], own.repeat_interleave(valid.sum(1))
        remembered = hidden.new_zeros(*valid.shape, vocabulary)
        parts = []
        for start in range(0, len(queries), QUERIES):
            some = slice(start, start + QUERIES)
            barred = own[some, None] == store.places
            distances, entries = nearest(store.keys, queries[some], barred, self.settings.neighbours)
            weights = -distances / self.settings.temperature
            parts.append(votes(weights, store.values[entries], vocabulary))
        remembered[valid] = torch.cat(parts)
        return remembered

    def _from_cache(self, hidden: Tensor, batch: Batch, vocabulary: int) -> Tensor | None:
        """[B, T, V] probabilities of what followed earlier moments of the row."""
        if not self.settings.cache_share:
            return None
        length = hidden.shape[1]
        past = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril(-1)
        flatness = 0.0 if self.settings.shuffled else self.settings.flatness
        match = (flatness * hidden @ hidden.mT).masked_fill(~past, -torch.inf)  # [B, T, T]
        following = batch.input_ids.roll(-1, 1)[:, None].expand(-1, length, -1)
        return votes(match, following, vocabulary)


def _numbers(rows: Sequence[Row]) -> dict[str, int]:
    """Document -> its number, in the order of the rows."""
    return {name: number for number, name in enumerate(dict.fromkeys(row.document for row in rows))}


def _refuse_packing(packed: bool) -> None:
    if packed:
        problem = "true, but a memory must know the document of every token"
        raise UserError("data.packing", problem, "set data.packing: false")
