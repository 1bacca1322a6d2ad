"""Losses against a teacher with another tokenizer, over the pieces of text that both cut out.

A piece ends at the same byte in both tokenizations, and no shorter one does. Where it is one token for each,
the two distributions before it are compared over the tokens that both vocabularies have, and all others as
one more; where it is several tokens for one of them, the likelihood of the piece is compared with that of
anything else, as in approximate likelihood matching (Minixhofer, Vulic and Ponti 2025, arXiv:2503.20083).
With one tokenizer every piece is a token that both have: then it is the loss of equal tokenizers. `uld`
compares the sorted probabilities before every piece (Boizard et al. 2024, arXiv:2402.12030), whatever they
belong to.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.losses.chunked import CHUNK_BYTES, chunk_bounds
from distill.losses.divergences import DIVERGENCES, at_temperature, sorted_distance
from distill.losses.teacher_output import NEVER, Aligned, Dense, States
from distill.models.lm_head import Head
from eval.core.errors import UserError
from eval.core.sections import Loss

LEAST = -1e-6  # log-likelihood of a piece that is taken for certain: what is left must have a logarithm


def cross_tokenizer_loss(hidden: Tensor, head: Head, labels: Tensor, target: Aligned, config: Loss) -> Tensor:
    """(1 - w) CE + w T^2 D, summed: CE over the student's tokens, D over the pieces, one term each.

    Its logits exist chunk by chunk, and are computed a second time for the gradient.

    Args:
        hidden: [N, D] of the student at its N valid tokens.
        labels: [N] the tokens themselves.

    Raises:
        UserError: the divergence is infinite, for the student has tokens that the teacher lacks.
    """
    buckets = _Buckets(target, head.weight.shape[0], config)
    own, its = target.own, target.its
    single = (_sizes(own, target.pieces) == 1) & (_sizes(its, target.pieces) == 1)
    if config.divergence == "uld":
        places, partners = _firsts(own, target.pieces), _firsts(its, target.pieces)
    else:
        places, partners = _members(own, single), _members(its, single)
    at_one, at_t, soft = [], [], torch.zeros((), device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, stop in chunk_bounds(
            len(hidden), CHUNK_BYTES, len(head.weight) + target.target.vocabulary
        ):
            here = (places >= start) & (places < stop)
            teacher = _rows(target.target, partners[here])
            part = (labels[start:stop], places[here] - start, teacher)
            one, t, divergence = checkpoint(
                buckets, hidden[start:stop], head.weight, head.bias, head, *part, use_reentrant=False
            )
            at_one.append(one)
            at_t.append(t)
            soft = soft + divergence
        if config.divergence != "uld":
            soft = soft + _piece_divergence(
                torch.cat([*at_t, hidden.new_zeros(0).float()]), target, ~single, config
            )
    hard = -sum(part.sum() for part in at_one)
    return (1 - config.weight) * hard + config.weight * config.temperature**2 * soft


class _Buckets:
    """What both tokenizers can say of a token: the ids that they share, and all others as one."""

    def __init__(self, target: Aligned, vocabulary: int, config: Loss) -> None:
        self.target, self.config = target, config
        self.own_rest = _others(target.shared_own, vocabulary)
        self.its_rest = _others(target.shared_its, target.tokens)
        if config.divergence == "reverse_kl" and len(self.own_rest) and not len(self.its_rest):
            problem = "reverse_kl is infinite: the student has tokens that its teacher lacks"
            raise UserError("train.loss.divergence", problem, "use skew_reverse_kl")

    def __call__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        places: Tensor,
        teacher: Dense | States,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[n] log-probabilities of the labels at temperatures 1 and T; summed divergence at `places`."""
        logits = replace(head, weight=weight, bias=bias)(hidden.float())  # [n, V]
        at_one = torch.log_softmax(logits, -1)
        at_t = at_temperature(at_one, self.config.temperature)
        labelled = [log_probs.gather(1, labels[:, None])[:, 0] for log_probs in (at_one, at_t)]
        with torch.no_grad():
            its = at_temperature(
                teacher.logits(0, len(places))[:, : self.target.tokens], self.config.temperature
            )
        if self.config.divergence == "uld":
            return labelled[0], labelled[1], sorted_distance(its, at_t[places])
        divergence = DIVERGENCES[self.config.divergence]
        return labelled[0], labelled[1], divergence(*self.shared(its, at_t[places]), self.config)

    def shared(self, its: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """[n, K] or [n, K + 1] log-probabilities of teacher and student, each normalised.

        A student that has the shared ids alone cannot say anything else: its teacher is taken over these.
        """
        kept, own_kept = its[:, self.target.shared_its], own[:, self.target.shared_own]
        if not len(self.own_rest):
            return torch.log_softmax(kept, -1), own_kept
        rest = torch.full_like(kept[:, :1], NEVER)
        if len(self.its_rest):
            rest = its[:, self.its_rest].logsumexp(-1, keepdim=True)
        own_rest = own[:, self.own_rest].logsumexp(-1, keepdim=True)
        return torch.cat([kept, rest], 1), torch.cat([own_kept, own_rest], 1)


def _piece_divergence(labelled: Tensor, target: Aligned, several: Tensor, config: Loss) -> Tensor:
    """Summed divergence between the likelihoods of pieces of several tokens: this piece, or anything else.

    Args:
        labelled: [N] log-probabilities of the student's tokens at temperature T.
        several: [P] bool, True for these pieces.
    """
    places, tokens = _members(target.own, several), _members(target.its, several)
    own = labelled.new_zeros(target.pieces).index_add(0, target.own[places], labelled[places])
    its = torch.zeros_like(own)
    with torch.no_grad():
        for start, stop in chunk_bounds(len(tokens), CHUNK_BYTES, target.target.vocabulary):
            some = tokens[start:stop]
            logits = _rows(target.target, some).logits(0, len(some))[:, : target.tokens]
            log_probs = at_temperature(logits, config.temperature).gather(1, target.labels[some, None])[:, 0]
            its = its.index_add(0, target.its[some], log_probs)
    return DIVERGENCES[config.divergence](_or_else(its[several]), _or_else(own[several]), config)


def _or_else(log_likelihood: Tensor) -> Tensor:
    """[P, 2] log-probabilities of an event [P] and of its opposite."""
    log_likelihood = log_likelihood.clamp(min=NEVER, max=LEAST)
    return torch.stack([log_likelihood, torch.log(-torch.expm1(log_likelihood))], -1)


def _rows(target: Dense | States, index: Tensor) -> Dense | States:
    if isinstance(target, Dense):
        return replace(target, log_probs=target.log_probs[index])
    return replace(target, hidden=[hidden[index] for hidden in target.hidden])


def _sizes(pieces: Tensor, count: int) -> Tensor:
    """[P] number of tokens of each piece."""
    return torch.bincount(pieces[pieces >= 0], minlength=count)


def _members(pieces: Tensor, wanted: Tensor) -> Tensor:
    """The places of the tokens whose piece is `wanted` [P] bool, in order."""
    places = (pieces >= 0).nonzero()[:, 0]
    return places[wanted[pieces[places]]]


def _firsts(pieces: Tensor, count: int) -> Tensor:
    """[P] place of the first token of each piece."""
    places = (pieces >= 0).nonzero()[:, 0]
    changes = torch.ones_like(places, dtype=torch.bool)
    changes[1:] = pieces[places[1:]] != pieces[places[:-1]]
    assert int(changes.sum()) == count
    return places[changes]


def _others(ids: Tensor, count: int) -> Tensor:
    """The ids below `count` that are not among `ids`."""
    kept = torch.ones(count, dtype=torch.bool, device=ids.device)
    kept[ids] = False
    return kept.nonzero()[:, 0]
