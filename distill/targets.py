"""What a teacher says about the N valid tokens of a batch, in the four forms that a loss can take.

Valid tokens are those of `batch.mask`, in its row-major order: entry n answers for the n-th True of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.head import Head
from eval.documents import Batch


@dataclass(frozen=True)
class Dense:
    """log_probs: [N, V] at T = 1, in any float dtype, normalised over V in float32."""

    log_probs: Tensor

    def part(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        return self.log_probs[start:stop].float()


@dataclass(frozen=True)
class States:
    """The mean of the distributions that one or several heads make of their hidden states.

    hidden: K tensors [N, D_k]; heads: K heads over one vocabulary V. No [N, V] tensor is ever made.
    """

    hidden: list[Tensor]
    heads: list[Head]

    def part(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        parts = [
            torch.log_softmax(head(hidden[start:stop]), dim=-1)
            for hidden, head in zip(self.hidden, self.heads, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.logsumexp(torch.stack(parts), dim=0) - torch.tensor(float(len(parts))).log()


@dataclass(frozen=True)
class Sampled:
    """Ids drawn from the teacher at `temperature`: an unbiased estimate of its distribution.

    ids: [N, K] int64, distinct within a token; counts: [N, K] float32, 0 where a place is unused, summing to
    the number of draws; entropy: [N] float32, of the teacher at that temperature, in nats.
    """

    ids: Tensor
    counts: Tensor
    entropy: Tensor
    temperature: float


@dataclass(frozen=True)
class TopK:
    """The k likeliest ids; what is left of the probability is one more bucket, the tail.

    ids: [N, k] int64; log_probs: [N, k] float32 at T = 1.
    """

    ids: Tensor
    log_probs: Tensor


Target = Dense | States | Sampled | TopK
Teacher = Callable[[Batch], Target]
