"""Bits that a model needs for each document: the likelihood that every score is made of."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from eval.documents import Batch, Document, batches, boundary_id, windows
from eval.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Predict = Callable[[Batch], Tensor]  # -> [B, T, V] logits or log-probabilities


@torch.no_grad()
def document_bits(
    predict: Predict,
    documents: list[Document],
    tokenizer: "PreTrainedTokenizerBase",
    context: int,
    batch_tokens: int = 4096,
) -> tuple[list[float], list[int]]:
    """Negative log2 likelihood and number of predicted tokens of each document, in their order.

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
    rows = [row for document in documents for row in windows(tokenizer, document, context)]
    bits = {document.id: 0.0 for document in documents}
    tokens = dict.fromkeys(bits, 0)
    assert len(bits) == len(documents), "ids are unique within a slice"
    for batch in batches(rows, boundary_id(tokenizer), batch_tokens):
        sums = row_bits(predict(batch), batch)
        for name, row_sum, count in zip(batch.documents, sums, batch.mask.sum(1).tolist(), strict=True):
            bits[name] += row_sum
            tokens[name] += count
    for name, value in bits.items():
        if not math.isfinite(value):
            mend = "the model's output is not finite there: look at its weights"
            raise UserError(f"document {name!r}", f"{value} bits", mend)
    return list(bits.values()), list(tokens.values())


def row_bits(scores: Tensor, batch: Batch) -> list[float]:
    """Bits of each row [B], from logits or log-probabilities [B, T, V]."""
    assert scores.shape[:2] == batch.input_ids.shape, f"[B, T, V] expected, got {tuple(scores.shape)}"
    nats = cross_entropy(
        scores[:, :-1].float().flatten(0, 1), batch.labels.to(scores.device).flatten(), reduction="none"
    ).view_as(batch.labels)
    kept = torch.where(batch.mask.to(nats.device), nats, 0.0)  # not a product: padding may hold infinity
    return (kept.double().sum(1) / math.log(2)).tolist()
