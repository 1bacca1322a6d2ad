"""Losses: sums over tokens, in float32, of logits against labels or against a teacher's log-probabilities.

Every function takes student logits [N, V] for N valid tokens and returns a scalar *sum*; the caller
divides by the number of valid tokens of the whole batch, over all processes and accumulation steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.sections import Loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over tokens of -log p(label), in nats. logits [N, V], labels [N]."""
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def forward_kl(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * sum over tokens of KL(teacher || student), both at temperature T, in nats.

    The factor T^2 keeps the gradient's size as T grows (Hinton, Vinyals and Dean 2015, section 2.1).

    Args:
        logits: [N, V] of the student.
        teacher: [N, V] log-probabilities at T = 1; softmax(log p / T) is softmax(z / T), exactly.
        temperature: T > 0.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    return F.kl_div(student, target, reduction="sum", log_target=True) * temperature**2


def generalized_jsd(logits: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """T^2 * sum over tokens of beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    p is the teacher and q the student (Agarwal et al. 2024, generalized knowledge distillation, eq. 1);
    beta = 0.5 is the Jensen-Shannon divergence, symmetric and at most log 2 per token at T = 1.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    weight = torch.tensor([beta, 1 - beta], device=logits.device).log()
    mixture = torch.logsumexp(torch.stack([target + weight[0], student + weight[1]]), dim=0)
    from_teacher = F.kl_div(mixture, target, reduction="sum", log_target=True)
    from_student = F.kl_div(mixture, student, reduction="sum", log_target=True)
    return (beta * from_teacher + (1 - beta) * from_student) * temperature**2


def distillation_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, config: Loss) -> Tensor:
    """(1 - w) CE + w divergence, summed over tokens; plain CE where there is no teacher.

    Args:
        logits: [N, V] of the student at the positions of valid tokens.
        labels: [N] the tokens themselves.
        teacher: [N, V] log-probabilities at T = 1, or None.
    """
    if teacher is None:
        return cross_entropy(logits, labels)
    assert teacher.shape == logits.shape, f"teacher {teacher.shape}, student {logits.shape}"
    if config.divergence == "forward_kl":
        divergence = forward_kl(logits, teacher, config.temperature)
    else:
        divergence = generalized_jsd(logits, teacher, config.beta, config.temperature)
    return (1 - config.weight) * cross_entropy(logits, labels) + config.weight * divergence
