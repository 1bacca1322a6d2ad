"""Passages of other training documents in front of a row, found by the words that came just before."""

import json
import math
import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_array
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.method import Card, Method, MethodContext, TeacherOutput
from distill.models.lm_head import head_of
from distill.models.prefix import Prefix
from eval.core.artifacts import write_text
from eval.core.config import Frozen
from eval.core.documents import Batch, boundary_id
from eval.core.errors import UserError

PASSAGES, DOCUMENTS = "passages.npy", "documents.json"
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


@dataclass(frozen=True)
class Library:
    """M passages of P tokens, and what BM25 needs of them."""

    passages: np.ndarray  # [M, P] int64
    documents: np.ndarray  # [M] the document that each is of, by its id
    weights: csr_array  # [M, V]
    first: int  # the boundary token
    seed: int

    def best(self, query: list[int], document: str, count: int) -> list[int]:
        """Numbers of the passages of other documents that score highest for a query, the best first."""
        known = [token for token in query if token < self.weights.shape[1]]
        asked = np.bincount(known, minlength=self.weights.shape[1])
        scores = np.where(self.documents == document, -math.inf, self.weights @ asked)
        return np.argsort(-scores, kind="stable")[:count].tolist()

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
        paper="in-context retrieval: Ram et al. 2023, arXiv:2302.00083; BM25: Robertson and Zaragoza 2009",
        claim="passages of other texts that share rare words with this one make it easier to predict",
        touches="the input: passages stand in front, found anew every few tokens",
        limits="a base must be able to read what stands in front, which takes more text than a small one has "
        "seen; what must be looked up may be too much for the weights of a student",
    )

    class Settings(Frozen):
        count: int = Field(1, gt=0, description="passages in front, each of another document than the row's")
        tokens: int = Field(64, gt=0, description="tokens of a passage")
        query: int = Field(32, gt=0, description="tokens before a stretch of the row by which they are found")
        stride: int = Field(64, gt=0, description="tokens of a stretch; the first one has no passages")
        drawn: bool = Field(False, description="passages are drawn, and not found: the control")

    def control(self) -> Method:
        """As many passages of the same length, drawn at random."""
        return Retrieval(self.settings.model_copy(update={"drawn": True}))

    def fit(self, context: MethodContext) -> None:
        """Cuts the training rows into passages, and writes them.

        Raises:
            UserError: rows are packed, or too few documents have a passage.
        """
        size, passages, documents = self.settings.tokens, list[list[int]](), list[str]()
        for row in context.rows():
            _refuse_packing(bool(row.packed))
            tokens = row.tokens[1:]
            starts = range(0, len(tokens) - size + 1, size)
            passages += [tokens[start : start + size] for start in starts]
            documents += [row.document] * len(starts)
        others = len(documents) - max(Counter(documents).values(), default=0)
        if others < self.settings.count:
            problem = f"{others} passages of {size} tokens for rows of the longest document, "
            fix = "lower `count` or `tokens`, or take more rows (data.train_rows)"
            raise UserError("method.settings", f"{problem}{self.settings.count} are needed", fix)
        np.save(context.folder / PASSAGES, np.array(passages, dtype=np.int64))
        write_text(context.folder / DOCUMENTS, json.dumps(documents))

    def tokens_in_front(self, tokenizer: PreTrainedTokenizerBase) -> int:
        return self.settings.count * (1 + self.settings.tokens)

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> Library:
        passages = np.load(context.folder / PASSAGES)
        documents = np.array(json.loads((context.folder / DOCUMENTS).read_text(encoding="utf-8")))
        first = boundary_id(context.tokenizer)
        return Library(passages, documents, bm25_weights(passages), first, context.seed)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        """Each stretch of a row after passages found by what stands before it, and never by itself."""
        _refuse_packing(batch.positions is not None)
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
        fronts = [self._front(some, row, start) for row in range(len(rows))] if start else None
        prefix = Prefix(torch.tensor(fronts, device=some.input_ids.device), None) if fronts else None
        output = self.model_output_after(teacher, some, [prefix] * len(rows))
        states = (output.hidden[0] if self.below is None else output.dense())[:, start:]
        every = states.new_zeros(len(batch.ids), *states.shape[1:])
        every[rows] = states
        return every

    def _front(self, batch: Batch, row: int, start: int) -> list[int]:
        """The ids in front of a stretch. Its first prediction is made after the token at `start`."""
        library: Library = self.parts
        document, count = batch.documents[row], self.settings.count
        if self.settings.drawn:
            return library.front(library.any(f"{batch.ids[row]} {start}", document, count))
        query = batch.input_ids[row, max(1, start + 1 - self.settings.query) : start + 1].tolist()
        return library.front(library.best(query, document, count))


def _refuse_packing(packed: bool) -> None:
    if packed:
        problem = "true, but passages are found for one document at a time"
        raise UserError("data.packing", problem, "set data.packing: false")
