"""Likelihood of documents under a model: bits, correct next tokens, and calibration, in one pass."""

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
CACHED_SLICES = 8  # so many keep their batches
PIECE = 2**18  # entries of one softmax: 1 MiB, half of the L2 cache of a core
GPU_PIECE = 2**28  # where there is no such cache, and every piece has to be started

_BATCHES: dict[str, list[Batch]] = {}


class TokenPredictions(NamedTuple):
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
    correct: list[int]  # tokens that were the likeliest
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
    prepared = prepare_batches(documents, tokenizer, context, batch_tokens)
    predictions = [predict_tokens(predict(batch), batch) for batch in prepared]
    nats, confidence, correct = (torch.cat(column).cpu() for column in zip(*predictions, strict=True))
    names = [name for batch in prepared for name in batch.documents]
    sizes = torch.cat([batch.mask.sum(1) for batch in prepared])  # tokens of each row, in the same order
    document_of = torch.tensor([place[name] for name in names]).repeat_interleave(sizes)
    bits = torch.bincount(document_of, nats.double() / math.log(2), minlength=len(place))
    tokens = torch.bincount(document_of, minlength=len(place))
    correct_tokens = torch.bincount(document_of[correct], minlength=len(place))
    require_finite(documents, bits)
    return Likelihoods(
        bits.tolist(),
        tokens.tolist(),
        correct_tokens.tolist(),
        Sums(*bin_by_confidence(confidence, correct).tolist()),
    )


def document_bits(
    predict: Predict,
    documents: list[Document],
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[list[float], list[int]]:
    """Bits and number of predicted tokens of each document; see `likelihoods`."""
    columns = likelihoods(predict, documents, tokenizer, context, batch_tokens)
    return columns.bits, columns.tokens


def prepare_batches(
    documents: list[Document], tokenizer: "PreTrainedTokenizerBase", context: int, batch_tokens: int
) -> list[Batch]:
    """Batches of the documents' windows.

    Models of a study share their tokenizer, and a worker scores many: the batches are cached for the next.
    """
    ids = tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id
    settings = tokenizer.chat_template, context, batch_tokens
    key = digest([*ids, *settings, [asdict(document) for document in documents]])
    if key not in _BATCHES:
        rows = [row for document in documents for row in windows(tokenizer, document, context)]
        while len(_BATCHES) >= CACHED_SLICES:
            del _BATCHES[next(iter(_BATCHES))]
        _BATCHES[key] = list(batches(rows, boundary_id(tokenizer), batch_tokens))
    return _BATCHES[key]


def require_finite(documents: list[Document], values: Tensor) -> None:
    """Raises a UserError that names the first document whose value, of [documents], is not finite."""
    for document, value in zip(documents, values.tolist(), strict=True):
        if not math.isfinite(value):
            fix = "bits must be finite: the model's output is not, so look at its weights"
            raise UserError(f"document {document.id!r}", f"{value} bits", fix)


def predict_tokens(scores: Tensor, batch: Batch) -> TokenPredictions:
    """The predictions in logits or log-probabilities [B, T, V] of the tokens under the batch's mask."""
    entries = PIECE if scores.device.type == "cpu" else GPU_PIECE
    parts, size = list(split_scores(scores, batch, entries)), rows_per_piece(scores.shape[2], entries)
    if len(parts) == 1:  # the usual case, and cutting is slow where a model is small
        return _predict_tokens(parts[0], *batch.targets)
    places, labels = batch.targets
    cuts = torch.searchsorted(places, torch.arange(size, size * len(parts), size))
    cut = zip(parts, places.tensor_split(cuts), labels.tensor_split(cuts), strict=True)
    predictions = [_predict_tokens(part, where - i * size, ids) for i, (part, where, ids) in enumerate(cut)]
    return TokenPredictions(*(torch.cat(column) for column in zip(*predictions, strict=True)))


def _predict_tokens(logits: Tensor, places: Tensor, labels: Tensor) -> TokenPredictions:
    """Of logits [n, V], at the places [m] of their rows, which predict the labels [m]."""
    places, labels = places.to(logits.device), labels.to(logits.device)
    log_probs, best = logits.log_softmax(-1), likeliest_tokens(logits)[places]
    return TokenPredictions(-log_probs[places, labels], log_probs[places, best].exp(), best == labels)


def rows_per_piece(vocabulary: int, entries: int) -> int:
    return max(1, entries // vocabulary)


def split_scores(scores: Tensor, batch: Batch, entries: int) -> Iterator[Tensor]:
    """Scores [B, T, V] as [n, V] in float32, views where they can be: no second [B, T, V] is made."""
    assert scores.shape[:2] == batch.input_ids.shape, f"[B, T, V] expected, got {tuple(scores.shape)}"
    for part in scores.flatten(0, 1).split(rows_per_piece(scores.shape[2], entries)):
        yield part.float()


def likeliest_tokens(scores: Tensor) -> Tensor:
    """[n] int64: the largest of each row [n, V], the first one of equals."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(-1))  # torch's own is ten times as slow there
    return scores.argmax(-1)


def bin_by_confidence(confidence: Tensor, correct: Tensor) -> Tensor:
    """`Sums` [3, BINS] over tokens [N], in bins of equal width by confidence; the last holds 1 too."""
    index = (confidence.double() * BINS).long().clamp(0, BINS - 1)
    weights = (torch.ones_like(confidence), confidence, correct)
    return torch.stack([torch.bincount(index, w.double(), minlength=BINS) for w in weights])
