"""What a model says of each document's tokens: the bits that it needs, and how right and how sure it is."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from eval.core.artifacts import digest
from eval.core.documents import Batch, Document, batches, boundary_id, windows
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Predict = Callable[[Batch], Tensor]  # -> [B, T, V] logits or log-probabilities
BATCH_TOKENS = 1024  # padded; more of them are no faster on a CPU, and slower once logits leave its cache
BINS = 15  # of equal width over [0, 1], as Guo et al. (2017) take them
KEPT = 8  # slices whose batches are kept
PIECE = 2**18  # entries of one softmax: 1 MiB, which is half of what a core keeps near itself

_PREPARED: dict[str, list[Batch]] = {}


class Predicted(NamedTuple):
    """One entry per predicted token, in the row-major order of the batch's mask."""

    nats: Tensor  # [N] float32, -log p of the token
    confidence: Tensor  # [N] float32, p of the likeliest token
    correct: Tensor  # [N] bool, whether that is the token


class Sums(NamedTuple):
    """Sums over the tokens whose confidence falls into each of the bins, [BINS] each."""

    tokens: list[float]
    confidence: list[float]
    correct: list[float]


class Likelihoods(NamedTuple):
    """Columns of equal length, one entry per document, and the bins of all of them together."""

    bits: list[float]
    tokens: list[int]
    correct: list[int]  # tokens that the model held to be the likeliest
    bins: Sums


@torch.no_grad()
def likelihoods(
    predict: Predict,
    documents: list[Document],
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Likelihoods:
    """Bits, predicted tokens and correct ones of each document, in their order.

    bits = -sum over the document's tokens of log2 p(token | boundary token and the tokens before it in
    its window). Every token is predicted once, in windows of `context` tokens, so that bits divided by
    bytes compare models of different tokenizers (Gao et al. 2020, "The Pile", section 3.1). The softmax
    is taken in float32, and leaves log-probabilities as they are; sums are taken in float64.

    Args:
        predict: position p of its [B, T, V] predicts the token at p + 1; padding is right and ignored.
        batch_tokens: padded tokens per batch; the result does not depend on it beyond rounding.

    Raises:
        UserError: a document has no tokens, or its likelihood is not finite.
    """
    place = {document.id: i for i, document in enumerate(documents)}
    assert len(place) == len(documents), "ids are unique within a slice"
    made = prepared(documents, tokenizer, context, batch_tokens)
    said = [predicted(predict(batch), batch) for batch in made]
    nats, confidence, correct = (torch.cat(column).cpu() for column in zip(*said, strict=True))
    names = [name for batch in made for name in batch.documents]
    sizes = torch.cat([batch.mask.sum(1) for batch in made])  # tokens of each row, in the order of `said`
    where = torch.tensor([place[name] for name in names]).repeat_interleave(sizes)
    bits = torch.bincount(where, nats.double() / math.log(2), minlength=len(place))
    tokens = torch.bincount(where, minlength=len(place))
    right = torch.bincount(where[correct], minlength=len(place))
    refuse_infinite(documents, bits)
    return Likelihoods(
        bits.tolist(), tokens.tolist(), right.tolist(), Sums(*binned(confidence, correct).tolist())
    )


def document_bits(
    predict: Predict,
    documents: list[Document],
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[list[float], list[int]]:
    """Bits and number of predicted tokens of each document; see `likelihoods`."""
    found = likelihoods(predict, documents, tokenizer, context, batch_tokens)
    return found.bits, found.tokens


def prepared(
    documents: list[Document], tokenizer: "PreTrainedTokenizerBase", context: int, batch_tokens: int
) -> list[Batch]:
    """Batches of the documents' windows.

    Models of a study share their tokenizer, and a worker scores many: what one needed is kept for the next.
    """
    told = [tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id]
    asked = [tokenizer.chat_template, context, batch_tokens, [asdict(document) for document in documents]]
    key = digest([*told, *asked])
    if key not in _PREPARED:
        rows = [row for document in documents for row in windows(tokenizer, document, context)]
        while len(_PREPARED) >= KEPT:
            del _PREPARED[next(iter(_PREPARED))]
        _PREPARED[key] = list(batches(rows, boundary_id(tokenizer), batch_tokens))
    return _PREPARED[key]


def refuse_infinite(documents: list[Document], values: Tensor) -> None:
    """Names the first document whose value [documents] is not finite."""
    for document, value in zip(documents, values.tolist(), strict=True):
        if not math.isfinite(value):
            fix = "the model's output is not finite there: look at its weights"
            raise UserError(f"document {document.id!r}", f"{value} bits", fix)


def predicted(scores: Tensor, batch: Batch) -> Predicted:
    """What logits or log-probabilities [B, T, V] say of the tokens under the batch's mask."""
    parts, size = list(pieces(scores, batch, PIECE)), piece_rows(scores.shape[2], PIECE)
    if len(parts) == 1:  # by far the most: cutting costs more than it seems where a model is small
        return _predicted(parts[0], *batch.asked)
    places, labels = batch.asked
    cuts = torch.searchsorted(places, torch.arange(size, size * len(parts), size))
    asked = zip(parts, places.tensor_split(cuts), labels.tensor_split(cuts), strict=True)
    said = [_predicted(part, where - i * size, ids) for i, (part, where, ids) in enumerate(asked)]
    return Predicted(*(torch.cat(column) for column in zip(*said, strict=True)))


def _predicted(logits: Tensor, places: Tensor, labels: Tensor) -> Predicted:
    """Of logits [n, V], at the places [m] of their rows, which predict the labels [m]."""
    places, labels = places.to(logits.device), labels.to(logits.device)
    log_probs, best = logits.log_softmax(-1), likeliest(logits)[places]
    return Predicted(-log_probs[places, labels], log_probs[places, best].exp(), best == labels)


def piece_rows(vocabulary: int, entries: int) -> int:
    return max(1, entries // vocabulary)


def pieces(scores: Tensor, batch: Batch, entries: int) -> Iterator[Tensor]:
    """Scores [B, T, V] as [n, V] in float32, views where they can be: no second [B, T, V] is made."""
    assert scores.shape[:2] == batch.input_ids.shape, f"[B, T, V] expected, got {tuple(scores.shape)}"
    for part in scores.flatten(0, 1).split(piece_rows(scores.shape[2], entries)):
        yield part.float()


def likeliest(scores: Tensor) -> Tensor:
    """[n] int64: the largest of each row [n, V], the first one of equals."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(-1))  # torch's own is ten times as slow there
    return scores.argmax(-1)


def binned(confidence: Tensor, correct: Tensor) -> Tensor:
    """`Sums` [3, BINS] over tokens [N], in bins of equal width by confidence; the last holds 1 too."""
    index = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    weights = (torch.ones_like(confidence), confidence, correct)
    return torch.stack([torch.bincount(index, w.double(), minlength=BINS) for w in weights])
