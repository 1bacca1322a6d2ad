"""Targets: a teacher's distributions of the N valid tokens of a batch, in forms that a loss accepts.

Valid tokens are those of `batch.mask`, in row-major order: entry n belongs to its n-th True.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.models.lm_head import Head
from eval.core.documents import Batch
from eval.core.errors import UserError


@dataclass(frozen=True)
class Dense:
    """log_probs: [N, V] at T = 1, in any float dtype, normalised over V in float32.

    layers: [N, D] of each teacher layer in `loss.hidden.pairs`, in that order.
    padding: ids after those of the teacher, to which it gives no probability.
    """

    log_probs: Tensor
    layers: tuple[Tensor, ...] = ()
    padding: int = 0

    @property
    def vocabulary(self) -> int:
        return self.log_probs.shape[1] + self.padding

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop, up to a constant of each token."""
        return _pad(self.log_probs[start:stop].float(), self.padding)

    def log_softmax(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        return self.logits(start, stop)


@dataclass(frozen=True)
class States:
    """The mean of the distributions that one or several heads make of their hidden states.

    hidden: K tensors [N, D_k]; heads: K heads over one vocabulary V. No [N, V] tensor is ever made.
    layers, padding: see Dense.
    """

    hidden: list[Tensor]
    heads: list[Head]
    layers: tuple[Tensor, ...] = ()
    padding: int = 0

    @property
    def vocabulary(self) -> int:
        return self.heads[0].weight.shape[0] + self.padding

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop, up to a constant of each token."""
        if len(self.heads) == 1:
            return _pad(self.heads[0](self.hidden[0][start:stop]), self.padding)
        return self.log_softmax(start, stop)

    def log_softmax(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        if len(self.heads) == 1:
            return torch.log_softmax(self.logits(start, stop), dim=-1)
        total = torch.zeros(0)
        for hidden, head in zip(self.hidden, self.heads, strict=True):
            log_probs = torch.log_softmax(head(hidden[start:stop]), dim=-1)
            total = torch.logaddexp(total, log_probs) if len(total) else log_probs
        return _pad(total - math.log(len(self.heads)), self.padding)


@dataclass(frozen=True)
class Mixed:
    """The weighted mean of the distributions of several teachers, of which some speak of a token.

    parts: the output of each for its N_m of the N tokens, all over one vocabulary; places: which ones these
    are, [N_m] int64, ascending; log_weights: [N_m] float32. The weights of a token sum to one.
    """

    parts: tuple[Dense | States, ...]
    places: tuple[Tensor, ...]
    log_weights: tuple[Tensor, ...]

    @property
    def vocabulary(self) -> int:
        return self.parts[0].vocabulary

    @property
    def padding(self) -> int:
        """Ids to which no teacher gives a probability."""
        return min(part.padding for part in self.parts)

    def logits(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        return self.log_softmax(start, stop)

    def log_softmax(self, start: int, stop: int) -> Tensor:
        """[n, V] float32 log-probabilities of the tokens start to stop."""
        device = self.places[0].device
        total = torch.full((stop - start, self.vocabulary), -torch.inf, device=device)
        bounds = torch.tensor([start, stop], device=device)
        for part, places, log_weights in zip(self.parts, self.places, self.log_weights, strict=True):
            first, last = torch.searchsorted(places, bounds).tolist()
            if first < last:
                rows = places[first:last] - start
                weighted = torch.log_softmax(part.logits(first, last), -1) + log_weights[first:last, None]
                total[rows] = torch.logaddexp(total[rows], weighted)
        return total


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

    ids: [N, k] int64; log_probs: [N, k] float32 at T = 1, -inf where an entry is unused: a teacher that named
    fewer ids. The id of such an entry is that of another one of its token.
    """

    ids: Tensor
    log_probs: Tensor

    def slice(self, start: int, stop: int) -> "TopK":
        """The target of the tokens start to stop."""
        return TopK(self.ids[start:stop], self.log_probs[start:stop])


@dataclass(frozen=True)
class Aligned:
    """What a teacher with another tokenizer says of its own M valid tokens, and how they fit the student's N.

    A piece is a stretch of text with an end of a token before and after it in both tokenizations.
    """

    target: Dense | States
    labels: Tensor  # [M] the teacher's tokens
    own: Tensor  # [N] int64, the piece of each of the student's tokens; ascending, -1: of none
    its: Tensor  # [M] the same of the teacher's
    pieces: int
    shared_own: Tensor  # [K] ids of the student's tokens that the teacher has too
    shared_its: Tensor  # [K] their ids in the teacher
    own_events: (
        Tensor  # [V] for each of the student's ids the place of the longest shared one that it begins with
    )
    its_events: Tensor  # [tokens] the same of the teacher's; K: it begins with none
    tokens: int  # ids of the teacher's tokenizer; further rows are padding


Whole = Dense | States | Mixed  # whole distributions
Target = Whole | Sampled | TopK
Teacher = Callable[[Batch], Target | Aligned]


AnyTarget = TypeVar("AnyTarget", bound=Target | Aligned)


class StoredTargets(ABC):
    """A teacher whose targets lie on disk: any process may read those of a batch, before its step comes."""

    @abstractmethod
    def __call__(self, batch: Batch) -> Target: ...


def to_device(target: AnyTarget, device: torch.device) -> AnyTarget:
    """The target with its tensors on `device`."""
    moved = {n: v.to(device) for n, v in vars(target).items() if isinstance(v, Tensor)}
    return replace(target, **moved)  # type: ignore


NEVER = -1e4  # logit of an id that has no probability: its exponential is 0, and no product with it is NaN


def _pad(logits: Tensor, padding: int) -> Tensor:
    """[n, V + padding] logits that give the ids after V no probability."""
    return F.pad(logits, (0, padding), value=NEVER) if padding else logits


def match_vocabulary(target: Target, vocabulary: int, divergence: str = "forward_kl") -> Target:
    """The target over the `vocabulary` ids of a student with the teacher's tokenizer.

    Heads are often padded beyond the ids of the tokenizer, a teacher's more than a student's or less. Padding
    of the teacher is cut off, and the loss normalises the rest again; to padding that only the student has,
    the teacher gives no probability.

    Raises:
        UserError: the target contains an id that the student lacks; or the divergence is infinite where the
            teacher gives no probability.
    """
    if isinstance(target, Sampled | TopK):
        largest = int(target.ids.max()) if target.ids.numel() else 0
        if largest >= vocabulary:
            problem = f"the targets contain id {largest}, but the student has {vocabulary} tokens"
            raise UserError("vocabulary", problem, "set targets.source: online, or targets.form: dense")
        return target
    rows = target.vocabulary - target.padding
    if rows < vocabulary and divergence in ("reverse_kl", "policy_gradient"):
        problem = f"{divergence} is infinite: the student has {vocabulary} rows, its teacher {rows}"
        raise UserError("train.loss.divergence", problem, "use skew_reverse_kl")
    if isinstance(target, Mixed):
        parts = tuple(match_vocabulary(part, vocabulary) for part in target.parts)
        return replace(target, parts=parts)  # type: ignore[arg-type]
    padding = max(0, vocabulary - rows)
    if rows <= vocabulary:
        return replace(target, padding=padding)
    if isinstance(target, Dense):
        return replace(target, log_probs=target.log_probs[:, :vocabulary], padding=0)
    return replace(target, heads=[head.cut(vocabulary) for head in target.heads], padding=0)
