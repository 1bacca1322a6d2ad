"""Losses: sums over tokens, in float32, of logits against labels and against what a teacher says.

Nothing here divides by a number of tokens: the caller does, by that of the whole batch, over all processes
and accumulation steps.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.teacher_output import Sampled, Target, TopK
from eval.core.errors import UserError
from eval.core.sections import Loss

BUCKETS = ("forward_kl", "jsd", "skew_forward_kl")  # what stays stable when the tail is one bucket
LEAST = 2.0**-24  # the float32 next below 1 is 1 - LEAST: a tail that is rounded away


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log p(label), in nats. logits [N, V], labels [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over tokens of KL(p || q), in nats; log-probabilities [N, V], p the teacher's, q the student's."""
    return F.kl_div(student, teacher, reduction="sum", log_target=True)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over tokens of KL(q || p) (Gu et al. 2024, MiniLLM, arXiv:2306.08543)."""
    return forward_kl(student, teacher)


def mixture(one: Tensor, other: Tensor, share: float) -> Tensor:
    """log(share * p + (1 - share) * q) of log-probabilities; 0 <= share < 1."""
    weight = math.log(share) if share else -math.inf
    return torch.logaddexp(one + weight, other + math.log1p(-share))


def generalized_jsd(teacher: Tensor, student: Tensor, beta: float = 0.5) -> Tensor:
    """Sum over tokens of beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al. 2024 (generalized knowledge distillation, arXiv:2306.13649, eq. 1); beta = 0.5 is the
    Jensen-Shannon divergence, symmetric and at most log 2 per token.
    """
    middle = mixture(teacher, student, beta)
    return beta * forward_kl(teacher, middle) + (1 - beta) * forward_kl(student, middle)


def skew_forward_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """Sum over tokens of KL(p || alpha p + (1 - alpha) q) (Ko et al. 2024, DistiLLM, arXiv:2402.03898)."""
    return forward_kl(teacher, mixture(teacher, student, alpha))


def skew_reverse_kl(teacher: Tensor, student: Tensor, alpha: float = 0.1) -> Tensor:
    """Sum over tokens of KL(q || (1 - alpha) p + alpha q) (Ko et al. 2024, DistiLLM, arXiv:2402.03898)."""
    return forward_kl(student, mixture(student, teacher, alpha))


def total_variation(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over tokens of half the sum of |p - q| (Wen et al. 2023, f-distillation, arXiv:2307.15190)."""
    return (teacher.exp() - student.exp()).abs().sum() / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "forward_kl": lambda p, q, loss: forward_kl(p, q),
    "reverse_kl": lambda p, q, loss: reverse_kl(p, q),
    "jsd": lambda p, q, loss: generalized_jsd(p, q, loss.beta),
    "skew_forward_kl": lambda p, q, loss: skew_forward_kl(p, q, loss.alpha),
    "skew_reverse_kl": lambda p, q, loss: skew_reverse_kl(p, q, loss.alpha),
    "total_variation": lambda p, q, loss: total_variation(p, q),
}


def at_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at T of those at 1, whatever constant each token carries: softmax(log p / T)."""
    return torch.log_softmax(log_probs if temperature == 1 else log_probs / temperature, dim=-1)


def sampled_kl(target: Sampled, student: Tensor) -> Tensor:
    """An estimate of the forward KL by the teacher's draws; its gradient is unbiased.

    The value is the cross-entropy of the draws less the teacher's entropy: it may fall below 0.

    Args:
        student: [N, V] log-probabilities at the temperature of the draws.
    """
    share = target.counts / target.counts.sum(-1, keepdim=True)
    return -(share * student.gather(1, target.ids)).sum() - target.entropy.sum()


def top_k_buckets(target: TopK, student: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, k + 1] of teacher and student: the k ids, and all the others as one bucket."""
    tail = (1 - target.log_probs.exp().sum(-1, keepdim=True)).clamp(min=LEAST).log()
    rest = student.scatter(1, target.ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([target.log_probs, tail], 1), torch.cat([student.gather(1, target.ids), rest], 1)


def divergence(logits: Tensor, target: Tensor | Sampled | TopK, config: Loss) -> Tensor:
    """T^2 * sum over tokens of the divergence that `config` names, both sides at temperature T, in nats.

    The factor keeps the gradient's size as T grows (Hinton, Vinyals and Dean 2015, section 2.1).

    Args:
        logits: [N, V] float32 of the student, or its log-probabilities at T = 1.
        target: the teacher's: [N, V] logits or log-probabilities at T = 1, or its answer in few ids.
    """
    return _divergence_at_t(at_temperature(logits, config.temperature), target, config)


def _divergence_at_t(student: Tensor, target: Tensor | Sampled | TopK, config: Loss) -> Tensor:
    """The same of the student's log-probabilities at T."""
    if isinstance(target, Sampled):
        found = sampled_kl(target, student)
    elif isinstance(target, TopK):
        found = DIVERGENCES[config.divergence](*top_k_buckets(target, student), config)
    else:
        found = DIVERGENCES[config.divergence](at_temperature(target, config.temperature), student, config)
    return found * config.temperature**2


def distillation_loss(
    logits: Tensor, labels: Tensor, target: Tensor | Sampled | TopK | None, config: Loss
) -> Tensor:
    """(1 - w) CE + w divergence, summed over tokens; plain CE where there is no teacher.

    Args:
        logits: [N, V] of the student at the positions of valid tokens.
        labels: [N] the tokens themselves.
        target: see `divergence`; None for labels alone.
    """
    weight, temperature = config.weight, config.temperature
    student = torch.log_softmax(logits.float(), dim=-1)
    hard = F.nll_loss(student, labels, reduction="sum")
    if target is None or weight == 0:
        return hard
    at_t = student if temperature == 1 else at_temperature(student, temperature)
    return (1 - weight) * hard + weight * _divergence_at_t(at_t, target, config)


def check_target(target: Target | None, config: Loss) -> None:
    """Refuses a divergence that cannot be had from the form of a target.

    Raises:
        UserError: the gradient would be biased, unstable, or at another temperature than the targets'.
    """
    name = config.divergence
    if isinstance(target, Sampled):
        if name != "forward_kl":
            found = f"{name} of sampled targets: only the forward KL has an unbiased gradient from draws"
            raise UserError("train.loss.divergence", found, "take forward_kl, or targets.form: dense")
        if config.temperature != target.temperature:
            found = f"{config.temperature}, and the targets were drawn at {target.temperature}"
            raise UserError("train.loss.temperature", found, "draw the targets again at this temperature")
    if isinstance(target, TopK):
        if name not in BUCKETS:
            found = (
                f"{name} of top-k targets: truncated, it is unstable, for the student's tail is unanswered"
            )
            fix = f"take one of {', '.join(BUCKETS)}, or targets.form: dense"
            raise UserError("train.loss.divergence", found, fix)
        if config.temperature != 1:
            found = f"{config.temperature} of top-k targets: the tail at another temperature is not known"
            raise UserError("train.loss.temperature", found, "take 1, or targets.form: sampled or dense")
