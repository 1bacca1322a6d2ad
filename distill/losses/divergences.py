"""Losses: sums over tokens, in float32, of logits against labels and against a teacher's targets.

Nothing here divides by a number of tokens: the caller divides by that of the whole step, over all processes
and accumulation steps.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.losses.teacher_output import NEVER, Sampled, Target, TopK
from eval.core.errors import UserError
from eval.core.sections import Loss

TOP_K_DIVERGENCES = ("forward_kl", "jsd", "skew_forward_kl")  # stable when the tail is one bucket
MIN_TAIL = 2.0**-24  # the float32 next below 1 is 1 - MIN_TAIL: a smaller tail is rounded away


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


def sorted_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over tokens of sum_i |p_(i) - q_(i)|, the probabilities of each sorted; vocabularies may differ.

    Universal logit distillation (ULD; Boizard et al. 2024, arXiv:2402.12030, eq. 5): the Wasserstein distance
    where all tokens are equally far from each other. The shorter one is continued with zeros.
    """
    width = max(teacher.shape[1], student.shape[1])
    descending = [
        F.pad(each.exp().sort(-1, descending=True).values, (0, width - each.shape[1]))
        for each in (teacher, student)
    ]
    return (descending[0] - descending[1]).abs().sum()


def policy_gradient(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of log q(y) - log p(y) at ids y that were drawn from q: an estimate of KL(q || p).

    Its gradient is that of REINFORCE, every token with an advantage of its own, log p(y) - log q(y). Over the
    draws its mean is the gradient of KL(q || p) at this position (Gu et al. 2024, MiniLLM, arXiv:2306.08543;
    Lu and Thinking Machines Lab 2025, On-Policy Distillation).

    Args:
        teacher, student: [N, V] log-probabilities at T = 1.
        labels: [N] the ids y.
    """
    own = student.gather(1, labels[:, None])
    cost = (own - teacher.gather(1, labels[:, None])).detach()
    return (cost + cost * (own - own.detach())).sum()


# p: the teacher's log-probabilities, q: the student's; policy_gradient needs the labels beside them
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Loss], Tensor]] = {
    "forward_kl": lambda p, q, loss: forward_kl(p, q),
    "reverse_kl": lambda p, q, loss: reverse_kl(p, q),
    "jsd": lambda p, q, loss: generalized_jsd(p, q, loss.beta),
    "skew_forward_kl": lambda p, q, loss: skew_forward_kl(p, q, loss.alpha),
    "skew_reverse_kl": lambda p, q, loss: skew_reverse_kl(p, q, loss.alpha),
    "total_variation": lambda p, q, loss: total_variation(p, q),
    "uld": lambda p, q, loss: sorted_distance(p, q),
}


def at_temperature(log_probs: Tensor, temperature: float) -> Tensor:
    """Log-probabilities at temperature T from logits or log-probabilities at 1: log softmax(log p / T)."""
    return torch.log_softmax(log_probs if temperature == 1 else log_probs / temperature, dim=-1)


def sampled_kl(target: Sampled, student: Tensor) -> Tensor:
    """An estimate of the forward KL from ids sampled from the teacher; its gradient is unbiased.

    The value is the cross-entropy of the samples minus the teacher's entropy: it may be negative.

    Args:
        student: [N, V] log-probabilities at the temperature of the samples.
    """
    shares = target.counts / target.counts.sum(-1, keepdim=True)
    return -(shares * student.gather(1, target.ids)).sum() - target.entropy.sum()


def top_k_buckets(target: TopK, student: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [N, k + 1] of teacher and student: the k ids, and all other ids as one bucket.

    An unused entry is a bucket of probability 0 on both sides, which adds nothing to any divergence.
    """
    unused = target.log_probs == -torch.inf
    teacher = target.log_probs.masked_fill(unused, NEVER)
    tail = (1 - teacher.exp().sum(-1, keepdim=True)).clamp(min=MIN_TAIL).log()
    student_tail = student.scatter(1, target.ids, -torch.inf).logsumexp(-1, keepdim=True)
    own = student.gather(1, target.ids).masked_fill(unused, NEVER)
    return torch.cat([teacher, tail], 1), torch.cat([own, student_tail], 1)


def divergence(logits: Tensor, target: Tensor | Sampled | TopK, config: Loss) -> Tensor:
    """T^2 * sum over tokens of the divergence `config.divergence`, both sides at temperature T, in nats.

    The factor keeps the size of the gradient as T grows (Hinton, Vinyals and Dean 2015, section 2.1).

    Args:
        logits: [N, V] float32 of the student, or its log-probabilities at T = 1.
        target: the teacher's: [N, V] logits or log-probabilities at T = 1, or a sparse target.
    """
    return _divergence_at_t(at_temperature(logits, config.temperature), target, config)


def _divergence_at_t(student: Tensor, target: Tensor | Sampled | TopK, config: Loss) -> Tensor:
    """`divergence` from the student's log-probabilities at T."""
    if isinstance(target, Sampled):
        total = sampled_kl(target, student)
    elif isinstance(target, TopK):
        total = DIVERGENCES[config.divergence](*top_k_buckets(target, student), config)
    else:
        total = DIVERGENCES[config.divergence](at_temperature(target, config.temperature), student, config)
    return total * config.temperature**2


def distillation_loss(
    logits: Tensor, labels: Tensor, target: Tensor | Sampled | TopK | None, config: Loss
) -> Tensor:
    """(1 - w) CE + w divergence, summed over tokens; plain CE without a teacher.

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
    if config.divergence == "policy_gradient":
        assert isinstance(target, Tensor)
        return policy_gradient(at_temperature(target, 1), student, labels)
    at_t = student if temperature == 1 else at_temperature(student, temperature)
    return (1 - weight) * hard + weight * _divergence_at_t(at_t, target, config)


def check_target(target: Target | None, config: Loss) -> None:
    """Refuses a divergence that cannot be computed from this form of targets.

    Raises:
        UserError: the gradient would be biased or unstable, or the temperature is not that of the targets.
    """
    name = config.divergence
    if isinstance(target, Sampled):
        if name != "forward_kl":
            problem = f"{name} with sampled targets: only forward_kl has an unbiased gradient from samples"
            raise UserError("train.loss.divergence", problem, "use forward_kl, or targets.form: dense")
        if config.temperature != target.temperature:
            problem = f"{config.temperature}, but the targets were sampled at {target.temperature}"
            raise UserError("train.loss.temperature", problem, "sample the targets again at this temperature")
    if isinstance(target, TopK):
        if name not in TOP_K_DIVERGENCES:
            problem = f"{name} with top-k targets: unstable where the teacher's tail is cut off"
            fix = f"use one of {', '.join(TOP_K_DIVERGENCES)}, or targets.form: dense"
            raise UserError("train.loss.divergence", problem, fix)
        if config.temperature != 1:
            problem = f"{config.temperature} with top-k targets: their tail is only known at temperature 1"
            raise UserError("train.loss.temperature", problem, "use 1, or targets.form: sampled or dense")
