"""Losses against a teacher with another tokenizer, over the pieces of text that both cut out.

A piece ends at the same byte in both tokenizations, and no shorter one does. Before each, the two
distributions of the next token are compared over the tokens that both vocabularies have; any other token
counts as the longest of these that it begins with. Where a piece is several tokens for one of them, its
likelihood is compared with that of anything else too, as in approximate likelihood matching (Minixhofer,
Vulic and Ponti 2025, arXiv:2503.20083). With one tokenizer every piece is a token that both have: then it is
the loss of equal tokenizers. `uld` compares sorted probabilities instead (Boizard et al. 2024,
arXiv:2402.12030).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.losses.chunked import CHUNK_BYTES, chunk_bounds
from distill.losses.divergences import DIVERGENCES, at_temperature, sorted_distance
from distill.losses.teacher_output import NEVER, Aligned, Dense, States
from distill.models.lm_head import Head
from eval.core.errors import UserError
from eval.core.sections import Loss

TINY = 1e-38  # a probability whose logarithm float32 has
LEAST = -1e-6  # log-likelihood of a piece that is taken for certain: what is left must have a logarithm


def cross_tokenizer_loss(hidden: Tensor, head: Head, labels: Tensor, target: Aligned, config: Loss) -> Tensor:
    """(1 - w) CE + w T^2 D, summed: CE over the student's tokens, D over the pieces.

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
    places, partners = _firsts(own, target.pieces), _firsts(its, target.pieces)
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
    """What both tokenizers can say of the next token: the ids that they share, and the rest."""

    def __init__(self, target: Aligned, vocabulary: int, config: Loss) -> None:
        self.target, self.config = target, config
        count = len(target.shared_own)
        padding = torch.full((vocabulary,), count, device=target.own_events.device)
        self.own_events = torch.cat([target.own_events, padding])[:vocabulary]
        self.own_others = _others(target.shared_own, vocabulary)
        self.its_others = _others(target.shared_its, target.tokens)
        self.own_has_rest = bool((self.own_events == count).any())
        its_has_rest = bool((target.its_events == count).any())
        if config.divergence == "reverse_kl" and self.own_has_rest and not its_has_rest:
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

        A student without a rest cannot say anything else: its teacher is taken over what both have.
        """
        target = self.target
        its = _gathered(its, target.shared_its, self.its_others, target.its_events)
        own = _gathered(own, target.shared_own, self.own_others, self.own_events)
        return (its, own) if self.own_has_rest else (torch.log_softmax(its[:, :-1], -1), own[:, :-1])


def _gathered(log_probs: Tensor, shared: Tensor, others: Tensor, events: Tensor) -> Tensor:
    """[n, K + 1] log-probabilities of the K shared ids, each with others that begin with it; then the rest.

    Args:
        log_probs: [n, V].
        events: [V] for each id the place of its shared id, or K.
    """
    shared_log_probs = F.pad(log_probs[:, shared], (0, 1), value=NEVER)
    if not len(others):
        return shared_log_probs
    joined = torch.zeros_like(shared_log_probs).index_add(1, events[others], log_probs[:, others].exp())
    return torch.logaddexp(shared_log_probs, joined.clamp(min=TINY).log())


def _piece_divergence(labelled: Tensor, target: Aligned, wanted: Tensor, config: Loss) -> Tensor:
    """Summed divergence between the likelihoods of some pieces: this one, or anything else.

    Args:
        labelled: [N] log-probabilities of the student's tokens at temperature T.
        wanted: [P] bool, True for these pieces.
    """
    places, tokens = _members(target.own, wanted), _members(target.its, wanted)
    own = labelled.new_zeros(target.pieces).index_add(0, target.own[places], labelled[places])
    its = torch.zeros_like(own)
    with torch.no_grad():
        for start, stop in chunk_bounds(len(tokens), CHUNK_BYTES, target.target.vocabulary):
            some = tokens[start:stop]
            logits = _rows(target.target, some).logits(0, len(some))[:, : target.tokens]
            log_probs = at_temperature(logits, config.temperature).gather(1, target.labels[some, None])[:, 0]
            its = its.index_add(0, target.its[some], log_probs)
    return DIVERGENCES[config.divergence](_or_else(its[wanted]), _or_else(own[wanted]), config)


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
    others = torch.ones(count, dtype=torch.bool, device=ids.device)
    others[ids] = False
    return others.nonzero()[:, 0]
