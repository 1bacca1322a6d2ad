"""Targets: a teacher's distributions of the N valid tokens of a batch, in four forms that a loss accepts.

Valid tokens are those of `batch.mask`, in row-major order: entry n belongs to its n-th True.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.models.lm_head import Head
from eval.core.documents import Batch
from eval.core.errors import UserError


@dataclass(frozen=True)
class Dense:
    """log_probs: [N, V] at T = 1, in any float dtype, normalised over V in float32.

    layers: [N, D] of each teacher layer in `loss.hidden.pairs`, in that order.
    """

    log_probs: Tensor
    layers: tuple[Tensor, ...] = ()

    @property
    def vocabulary(self) -> int:
        return self.log_probs.shape[1]

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop, up to a constant of each token."""
        return self.log_probs[start:stop].float()

    def log_softmax(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        return self.logits(start, stop)


@dataclass(frozen=True)
class States:
    """The mean of the distributions that one or several heads make of their hidden states.

    hidden: K tensors [N, D_k]; heads: K heads over one vocabulary V. No [N, V] tensor is ever made.
    layers: see Dense.
    """

    hidden: list[Tensor]
    heads: list[Head]
    layers: tuple[Tensor, ...] = ()

    @property
    def vocabulary(self) -> int:
        return self.heads[0].weight.shape[0]

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop, up to a constant of each token."""
        if len(self.heads) == 1:
            return self.heads[0](self.hidden[0][start:stop])
        return self.log_softmax(start, stop)

    def log_softmax(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        if len(self.heads) == 1:
            return torch.log_softmax(self.logits(start, stop), dim=-1)
        total = torch.zeros(0)
        for hidden, head in zip(self.hidden, self.heads, strict=True):
            log_probs = torch.log_softmax(head(hidden[start:stop]), dim=-1)
            total = torch.logaddexp(total, log_probs) if len(total) else log_probs
        return total - math.log(len(self.heads))


@dataclass(frozen=True)
class Sampled:
    """Ids sampled from the teacher at `temperature`: an unbiased estimate of its distribution.

    ids: [N, K] int64, distinct within a token; counts: [N, K] float32, 0 where an entry is unused, summing to
    the number of samples; entropy: [N] float32, of the teacher at that temperature, in nats.
    """

    ids: Tensor
    counts: Tensor
    entropy: Tensor
    temperature: float

    def slice(self, start: int, stop: int) -> "Sampled":
        """The target of the tokens start to stop."""
        return Sampled(
            self.ids[start:stop], self.counts[start:stop], self.entropy[start:stop], self.temperature
        )


@dataclass(frozen=True)
class TopK:
    """The k most likely ids; the rest of the probability is one more bucket, the tail.

    ids: [N, k] int64; log_probs: [N, k] float32 at T = 1.
    """

    ids: Tensor
    log_probs: Tensor

    def slice(self, start: int, stop: int) -> "TopK":
        """The target of the tokens start to stop."""
        return TopK(self.ids[start:stop], self.log_probs[start:stop])


Target = Dense | States | Sampled | TopK
Teacher = Callable[[Batch], Target]


def cut_vocabulary(target: Target, vocabulary: int) -> Target:
    """The target over the first `vocabulary` ids; the loss normalises it again.

    Heads are often padded beyond the ids of the tokenizer, a teacher's more than a student's: only padding is
    cut off.

    Raises:
        UserError: the target has fewer ids than the student, or contains an id that the student lacks.
    """
    if isinstance(target, Sampled | TopK):
        largest = int(target.ids.max()) if target.ids.numel() else 0
        if largest >= vocabulary:
            problem = f"the targets contain id {largest}, but the student has {vocabulary} tokens"
            raise UserError("vocabulary", problem, "set targets.source: online, or targets.form: dense")
        return target
    if target.vocabulary < vocabulary:
        problem = f"the teacher has {target.vocabulary} tokens, the student {vocabulary}"
        raise UserError("vocabulary", problem, "give the student no more tokens than its teacher")
    if target.vocabulary == vocabulary:
        return target
    if isinstance(target, Dense):
        return replace(target, log_probs=target.log_probs[:, :vocabulary])
    return replace(target, heads=[head.cut(vocabulary) for head in target.heads])
