"""Validation bits per byte of a student while it learns."""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.core.documents import batches, read_documents, windows
from eval.core.records import VALIDATION


class Validation:
    """Bits per byte of the validation documents of a data artifact, in the rows in which they are scored.

    Every process of a launch goes through all of them, so that a student in shards can be asked too.
    """

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerBase, context: int, pad: int) -> None:
        documents = read_documents(data, VALIDATION)
        rows = [row for document in documents for row in windows(tokenizer, document, context)]
        self.bytes, self.batches = (
            sum(document.bytes for document in documents),
            list(batches(rows, pad, 1024)),
        )

    @torch.no_grad()
    def __call__(self, learner: nn.Module) -> float:
        """Of a DistillationModule or what wraps one; it goes on as if it had not been asked."""
        device = next(learner.parameters()).device
        learner.eval()
        nats = sum(float(learner(batch.to(device), None)) for batch in self.batches)
        learner.train()
        return nats / math.log(2) / self.bytes
