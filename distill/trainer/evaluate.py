"""Validation bits per byte of a student during training."""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from eval.core.documents import batches, read_documents, windows
from eval.core.records import VALIDATION


class Validation:
    """Bits per byte of the validation documents of a data artifact, in the same rows as in scoring.

    Every process of a launch evaluates all documents, so that a sharded student works too.
    """

    def __init__(self, data: Path, tokenizer: PreTrainedTokenizerBase, context: int, pad: int) -> None:
        documents = read_documents(data, VALIDATION)
        rows = [row for document in documents for row in windows(tokenizer, document, context)]
        self.bytes = sum(document.bytes for document in documents)
        self.batches = list(batches(rows, pad, 1024))

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> float:
        """Evaluates a DistillationModule, wrapped or not, and returns it to training mode."""
        device = next(module.parameters()).device
        module.eval()
        nats = sum(float(module(batch.to(device), None)) for batch in self.batches)
        module.train()
        return nats / math.log(2) / self.bytes
