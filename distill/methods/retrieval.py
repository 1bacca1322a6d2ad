"""Passages of other training documents in front of a row, found by the words that came just before."""

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.sparse import csr_array
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.method import Card, Method, MethodContext, TeacherOutput, plain_output
from distill.models.encoder import Encoder, load_encoder
from distill.models.generation import refuse_packing
from distill.models.lm_head import head_of
from distill.models.load import model_origin
from distill.models.prefix import Prefix
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, boundary_id
from eval.core.errors import UserError
from eval.core.sections import NamedModel

ENCODER = "method.settings.encoder.path"
PACKING = "passages are found for one document at a time"
PASSAGES, VECTORS, DOCUMENTS = "passages.npy", "vectors.npy", "documents.json"
Finder = Callable[[list[list[int]]], np.ndarray]  # Q queries of token ids -> [Q, M] scores of the passages
SATURATION = 1.2  # k1 of BM25: how soon further occurrences of a word count no more


def bm25_weights(passages: np.ndarray, saturation: float = SATURATION) -> csr_array:
    """[M, V] what a passage scores for each token of a query: BM25 (Robertson and Zaragoza 2009).

    All passages have one length, so that its normalisation by length is 1.

    Args:
        passages: [M, P] token ids.
    """
    count, length = passages.shape
    places = np.repeat(np.arange(count), length)
    shape = (count, int(passages.max()) + 1)
    times = csr_array((np.ones(passages.size), (places, passages.ravel())), shape=shape)
    times.sum_duplicates()
    found_in = np.bincount(times.indices, minlength=shape[1])
    rarity = np.log1p((count - found_in + 0.5) / (found_in + 0.5))
    times.data = times.data * (saturation + 1) / (times.data + saturation) * rarity[times.indices]
    return times


def find_by_words(passages: np.ndarray) -> Finder:
    """Scores of BM25."""
    weights = bm25_weights(passages)
    tokens = weights.shape[1]

    def scores(queries: list[list[int]]) -> np.ndarray:
        asked = [np.bincount([t for t in query if t < tokens], minlength=tokens) for query in queries]
        return np.stack([weights @ times for times in asked])

    return scores


def find_by_meaning(vectors: np.ndarray, encoder: Encoder, tokenizer: PreTrainedTokenizerBase) -> Finder:
    """Cosines between what an encoder makes of the texts.

    Args:
        vectors: [M, E] float32, of length 1, of the passages.
    """

    def scores(queries: list[list[int]]) -> np.ndarray:
        return encoder.embed(tokenizer.batch_decode(queries)).numpy() @ vectors.T

    return scores


def likelihoods(model: PreTrainedModel, first: int, passages: np.ndarray, query: list[int]) -> list[float]:
    """The log-likelihood of a query after each passage, in nats: Sachan et al. 2022, arXiv:2204.07496, eq. 2.

    Args:
        first: the boundary token, in front of each passage.
        passages: [C, P] token ids.
    """
    count, length = passages.shape
    front = torch.full((count, 1), first, dtype=torch.int64)
    asked = torch.tensor(query)
    ids = torch.cat([front, torch.from_numpy(passages), asked.expand(count, -1)], dim=1).to(model.device)
    names = [""] * count
    output = plain_output(model, batch=Batch(names, names, names, ids, torch.ones_like(ids)))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, length:-1] = True  # a position predicts the next one
    log_probs = output.select(mask).log_softmax(0, int(mask.sum()))
    said = log_probs.gather(1, asked.repeat(count)[:, None].to(model.device))
    return said.view(count, -1).sum(1).tolist()


@dataclass(frozen=True)
class Library:
    """M passages of P tokens, and what finds them."""

    passages: np.ndarray  # [M, P] int64
    documents: np.ndarray  # [M] the document that each is of, by its id
    scores: Finder
    first: int  # the boundary token
    seed: int

    def best(self, queries: list[list[int]], documents: Sequence[str], count: int) -> list[list[int]]:
        """For each query numbers of the passages of other documents that score highest, the best first."""
        barred = np.array(documents)[:, None] == self.documents
        scores = np.where(barred, -math.inf, self.scores(queries))
        return [np.argsort(-row, kind="stable")[:count].tolist() for row in scores]

    def any(self, key: str, document: str, count: int) -> list[int]:
        """Numbers of passages of other documents that `key` draws."""
        draw, chosen = random.Random(f"{self.seed} {key}"), list[int]()
        while len(chosen) < count:
            number = draw.randrange(len(self.passages))
            if number not in chosen and self.documents[number] != document:
                chosen.append(number)
        return chosen

    def front(self, numbers: list[int]) -> list[int]:
        """The ids of passages, the first one last, each after the boundary token."""
        return [t for number in reversed(numbers) for t in (self.first, *self.passages[number].tolist())]


class Retrieval(Method):
    card = Card(
        title="Retrieved passages",
        paper="in-context retrieval: Ram et al. 2023, arXiv:2302.00083; BM25: Robertson and Zaragoza 2009; "
        "dense: Karpukhin et al. 2020, arXiv:2004.04906; reranked: Sachan et al. 2022, arXiv:2204.07496",
        claim="passages of other texts that are near to this one make it easier to predict",
        touches="the input: passages stand in front, found anew every few tokens",
        limits="a base must be able to read what stands in front, which takes more text than a small one has "
        "seen; what must be looked up may be too much for the weights of a student",
    )

    class Settings(Frozen):
        count: int = Field(1, gt=0, description="passages in front, each of another document than the row's")
        tokens: int = Field(64, gt=0, description="tokens of a passage")
        query: int = Field(32, gt=0, description="tokens before a stretch of the row by which they are found")
        stride: int = Field(64, gt=0, description="tokens of a stretch; the first one has no passages")
        encoder: NamedModel | None = Field(
            None, description="finds passages by the cosine of its vectors; none: by words (BM25)"
        )
        pool: int = Field(
            0,
            ge=0,
            description="passages that are found, and ordered by how likely they make the query to the "
            "teacher; 0: they stay as they are found",
        )
        drawn: bool = Field(False, description="passages are drawn, and not found: the control")

        @model_validator(mode="after")
        def pool_holds_them(self) -> Self:
            if self.pool and self.pool < self.count:
                raise ValueError(f"pool {self.pool} is below count {self.count}; give 0, or a larger one")
            if self.encoder is not None and self.encoder.path is None:
                raise ValueError("encoder needs a path")
            return self

    def control(self) -> Method:
        """As many passages of the same length, drawn at random."""
        plain = {"drawn": True, "encoder": None, "pool": 0}
        return Retrieval(self.settings.model_copy(update=plain))

    @cached_property
    def identity(self) -> list[Any]:
        """The settings, with the content of the encoder that they name."""
        return [*super().identity, *([self._origin] if self.settings.encoder is not None else [])]

    @cached_property
    def _origin(self) -> dict[str, Any]:
        with TemporaryDirectory() as folder:
            return model_origin(self.settings.encoder, Path(folder) / "hashes.json", ENCODER)

    def _encoder(self) -> Encoder:
        return load_encoder(self.settings.encoder, self._origin.get("commit"), ENCODER)

    def fit(self, context: MethodContext) -> None:
        """Cuts the training rows into passages, and writes them.

        Raises:
            UserError: rows are packed, or too few documents have a passage.
        """
        size, passages, documents = self.settings.tokens, list[list[int]](), list[str]()
        for row in context.rows():
            refuse_packing(bool(row.packed), PACKING)
            tokens = row.tokens[1:]
            starts = range(0, len(tokens) - size + 1, size)
            passages += [tokens[start : start + size] for start in starts]
            documents += [row.document] * len(starts)
        others = len(documents) - max(Counter(documents).values(), default=0)
        if others < (needed := max(self.settings.count, self.settings.pool)):
            problem = f"{others} passages of {size} tokens for rows of the longest document, "
            fix = "lower `count`, `pool` or `tokens`, or take more rows (data.train_rows)"
            raise UserError("method.settings", f"{problem}{needed} are needed", fix)
        np.save(context.folder / PASSAGES, np.array(passages, dtype=np.int64))
        if self.settings.encoder is not None:
            texts = context.tokenizer.batch_decode(passages)
            np.save(context.folder / VECTORS, self._encoder().embed(texts).numpy())
        write_text(context.folder / DOCUMENTS, json.dumps(documents))

    def tokens_in_front(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self.settings.count * (1 + self.settings.tokens)

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> Library:
        passages = np.load(context.folder / PASSAGES)
        documents = np.array(json.loads((context.folder / DOCUMENTS).read_text(encoding="utf-8")))
        scores = find_by_words(passages)
        if self.settings.encoder is not None:
            vectors = np.load(context.folder / VECTORS)
            scores = find_by_meaning(vectors, self._encoder(), context.tokenizer)
        return Library(passages, documents, scores, boundary_id(context.tokenizer), context.seed)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """Each stretch of a row after passages found by what stands before it, and never by itself."""
        refuse_packing(batch.positions is not None, PACKING)
        length, stride = batch.input_ids.shape[1], self.settings.stride
        stretches = [
            self._stretch(teacher, batch, start, min(start + stride, length))
            for start in range(0, length, stride)
        ]
        states = torch.cat(stretches, dim=1)
        if self.below is not None:
            return TeacherOutput(states)
        return TeacherOutput(hidden=[states], heads=[head_of(teacher).detach(states.dtype)])

    def _stretch(self, teacher: PreTrainedModel, batch: Batch, start: int, end: int) -> Tensor:
        """[B, end - start, D] last hidden states of a stretch; in a chain log-probabilities [.., V].

        They are zero in rows that end before it.
        """
        rows = (batch.attention_mask[:, start] > 0).nonzero()[:, 0].tolist()
        some = Batch(
            [batch.ids[row] for row in rows],
            [batch.documents[row] for row in rows],
            [batch.domains[row] for row in rows],
            batch.input_ids[rows, :end],
            batch.attention_mask[rows, :end],
        )
        fronts = self._fronts(teacher, some, start) if start else None
        prefix = Prefix(torch.tensor(fronts, device=some.input_ids.device), None) if fronts else None
        output = self.model_output_after(teacher, some, [prefix] * len(rows))
        states = (output.hidden[0] if self.below is None else output.dense())[:, start:]
        every = states.new_zeros(len(batch.ids), *states.shape[1:])
        every[rows] = states
        return every

    def _fronts(self, teacher: PreTrainedModel, batch: Batch, start: int) -> list[list[int]]:
        """Of each row the ids in front of a stretch, whose first prediction is made after `start`."""
        library: Library = self.parts
        count, pool = self.settings.count, self.settings.pool
        if self.settings.drawn:
            named = zip(batch.ids, batch.documents, strict=True)
            return [
                library.front(library.any(f"{name} {start}", document, count)) for name, document in named
            ]
        queries = batch.input_ids[:, max(1, start + 1 - self.settings.query) : start + 1].tolist()
        best = library.best(queries, batch.documents, pool or count)
        if pool:
            best = [self._reranked(teacher, *pair) for pair in zip(best, queries, strict=True)]
        return [library.front(numbers[:count]) for numbers in best]

    def _reranked(self, teacher: PreTrainedModel, numbers: list[int], query: list[int]) -> list[int]:
        """The same passages, first the one after which the teacher expects the query most."""
        library: Library = self.parts
        said = likelihoods(teacher, library.first, library.passages[numbers], query)
        return [number for _, number in sorted(zip(said, numbers, strict=True), key=lambda one: -one[0])]
