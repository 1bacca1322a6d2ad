"""Validation bits per byte of a student during training."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.trainer.distributed import is_sharded
from eval.core.documents import batches, read_documents, windows
from eval.core.records import VALIDATION


class Validation:
    """Bits per byte of the validation documents of a data artifact, in the same rows as in scoring.

    The processes of a launch share out the batches, and the sum is the same for any number of them. All run
    all batches of a sharded student, which no process holds alone.
    """

    def __init__(
        self,
        data: Path,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        pad: int,
        acc: Accelerator | None = None,
    ) -> None:
        documents = read_documents(data, VALIDATION)
        rows = [row for document in documents for row in windows(tokenizer, document, context)]
        self.bytes = sum(document.size for document in documents)
        self.batches = list(batches(rows, pad, 1024))
        self.index, self.processes = 0, 1
        if acc is not None and not is_sharded(acc):
            self.index, self.processes = acc.process_index, acc.num_processes

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> float:
        """Evaluates a DistillationModule, wrapped or not, and returns it to training mode."""
        device = next(module.parameters()).device
        module.eval()
        mine = range(self.index, len(self.batches), self.processes)
        nats = [(i, float(module(self.batches[i].to(device), None))) for i in mine]
        module.train()
        if self.processes > 1:
            nats = sorted(gather_object(nats))  # in the order of batches, as one process adds them
        return sum(value for _, value in nats) / math.log(2) / self.bytes
