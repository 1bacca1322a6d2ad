"""The loss of a batch from hidden states: head, loss and gradient are computed chunk by chunk.

No [tokens, vocabulary] tensor of the whole batch ever exists. The gradient is computed in the forward pass,
where the logits of a chunk are at hand, and stored for the hidden states [N, D] and the head [V, D].
Functions whose name ends in `_` overwrite their logits [n, V] with the gradient of the loss.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.divergences import check_target, distillation_loss
from distill.losses.teacher_output import Sampled, Target, TopK, Whole, match_vocabulary
from distill.models.lm_head import Head, half_product, is_half_precision
from eval.core.sections import Loss

CHUNK_BYTES = 2**26  # float32 logits of one chunk: large enough for matrix products at full speed
BLOCK_BYTES = 2**20  # float32 logits of one block on a CPU: they stay in a core's cache meanwhile
SUM_BYTES = 2**23  # float32 gradients of the head's rows that a CPU sums at a time, for the same reason


def chunked_loss(hidden: Tensor, head: Head, labels: Tensor, target: Target | None, config: Loss) -> Tensor:
    """Value and gradient of `divergences.distillation_loss` for head(hidden), in little memory.

    Args:
        hidden: [N, D] of the student at the N valid tokens.
        labels: [N] the tokens themselves.
        target: the teacher's output for them; None for labels alone.

    Raises:
        UserError: the divergence cannot be computed from this form of targets.
    """
    check_target(target, config)
    if target is not None:
        target = match_vocabulary(target, head.weight.shape[0], config.divergence)
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # autograd would still ask for the gradient of the head
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return _ChunkedLoss.apply(hidden, weight, bias, head, labels, target, config)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient of a batch, in one pass over its chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        head, labels, target, config = rest
        total, centred = torch.zeros((), device=hidden.device), hidden.detach()
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            if is_half_precision(hidden) and not hidden.is_cuda and len(hidden):
                head, centred = head.centred(centred)
            head = head.detach(hidden.dtype)
            size = 2 * CHUNK_BYTES if head.rounded else CHUNK_BYTES  # rounded products have 16 bits
            for start, stop in chunk_bounds(len(hidden), size, len(weight)):
                logits = head.product(centred[start:stop])
                chunk_target = slice_target(target, start, stop)
                total += _head_loss_(logits, head, labels[start:stop], chunk_target, config)
                if hidden_grad is not None:
                    hidden_grad[start:stop] = _product(logits, head.weight)
                if weight_grad is not None:
                    _add_product_(weight_grad, logits.mT, hidden[start:stop])
                if bias_grad is not None:
                    bias_grad += logits.sum(0, dtype=torch.float32)
        ctx.gradients = [hidden_grad, weight_grad, bias_grad]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # no second reference: they become `.grad` uncopied
        return *(None if grad is None else grad.mul_(scale) for grad in gradients), None, None, None, None


def chunk_bounds(tokens: int, size: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of chunks whose float32 logits take `size` bytes; one token at least."""
    step = max(1, size // (4 * vocabulary))
    yield from ((start, min(tokens, start + step)) for start in range(0, tokens, step))


def slice_target(target: Target | Tensor | None, start: int, stop: int) -> Tensor | Sampled | TopK | None:
    """The target of the tokens start to stop, in the form in which a loss takes it."""
    if isinstance(target, Tensor):
        return target[start:stop]
    if isinstance(target, Whole):
        return target.logits(start, stop)
    return None if target is None else target.slice(start, stop)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Product of a matrix with another, in the dtype of the other, accumulated in float32."""
    if is_half_precision(other):
        return half_product(one.to(other.dtype), other)
    return torch.mm(one, other.float())


def _add_product_(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Adds a product [V, D] in the dtype of `other` to a float32 `total`, on a CPU by blocks of its rows.

    So a product of 16 bits is widened within the cache, and never exists as a whole.
    """
    if not is_half_precision(other):
        total.addmm_(one, other.float())
        return
    one = one.to(other.dtype)
    size = SUM_BYTES if not total.is_cuda else 4 * total.numel()
    for start, stop in chunk_bounds(len(total), size, total.shape[1]):
        total[start:stop] += half_product(one[start:stop], other)


def _head_loss_(
    products: Tensor, head: Head, labels: Tensor, target: Tensor | Sampled | TopK | None, config: Loss
) -> Tensor:
    """Summed loss of a head's products [n, V] before scale and cap; they become the gradient of the loss.

    On a CPU block by block, so that one block stays in the cache while it is worked on, in float32 whatever
    the dtype of the products.
    """
    size = CHUNK_BYTES if products.is_cuda else BLOCK_BYTES
    loss = torch.zeros((), device=products.device)
    for start, stop in chunk_bounds(len(products), size, products.shape[1]):
        logits = head.widened(products[start:stop])
        slope = head.scale_and_cap_(logits)
        loss += loss_and_gradient_(logits, labels[start:stop], slice_target(target, start, stop), config)
        if slope is not None:
            logits *= slope
        elif head.scale != 1:
            logits *= head.scale
        if head.rounded:
            products[start:stop] = logits
    return loss


def loss_and_gradient_(
    logits: Tensor, labels: Tensor, target: Tensor | Sampled | TopK | None, config: Loss
) -> Tensor:
    """`divergences.distillation_loss` of float32 logits [n, V], which become its gradient.

    The gradients of cross-entropy, of the forward KL and of the policy gradient are written out, the others
    are left to autograd.
    """
    weight, temperature = config.weight, config.temperature
    if target is None or weight == 0:
        return _soft_cross_entropy_(logits, labels[:, None], torch.ones_like(logits[:, :1]))
    if config.divergence == "policy_gradient":
        assert isinstance(target, Tensor)
        return _policy_gradient_(logits, labels[:, None], target)
    if config.divergence != "forward_kl" or isinstance(target, TopK):
        with torch.enable_grad():
            leaf = logits.clone().requires_grad_()
            loss = distillation_loss(leaf, labels, target, config)
            (gradient,) = torch.autograd.grad(loss, leaf)
        logits.copy_(gradient)
        return loss.detach()
    if temperature == 1:
        return _cross_entropy_and_kl_(logits, labels, target, weight)
    at_one = logits.clone()  # cross-entropy is at temperature 1, the divergence at T
    target = target / temperature if isinstance(target, Tensor) else target
    soft = _cross_entropy_and_kl_(logits.div_(temperature), labels, target, 1.0) * temperature**2
    logits *= weight * temperature
    hard = _soft_cross_entropy_(at_one, labels[:, None], torch.ones_like(at_one[:, :1]))
    logits.add_(at_one, alpha=1 - weight)
    return (1 - weight) * hard + weight * soft


def _cross_entropy_and_kl_(logits: Tensor, labels: Tensor, target: Tensor | Sampled, weight: float) -> Tensor:
    """Sum over tokens of (1 - w) CE + w KL(p || q), both at the temperature that logits and target have.

    Two exponentials an entry in all: both distributions are made once, for the value and for the gradient
    q - w p - (1 - w) [label].

    Args:
        target: [n, V] log-probabilities up to a constant of each token, or ids drawn from p.
    """
    if isinstance(target, Sampled):
        sampled = weight * target.counts / target.counts.sum(-1, keepdim=True)
        shares = torch.cat([sampled, torch.full_like(sampled[:, :1], 1 - weight)], 1)
        ids = torch.cat([target.ids, labels[:, None]], 1)
        return _soft_cross_entropy_(logits, ids, shares) - weight * target.entropy.sum()
    gap = target - target.amax(-1, keepdim=True)
    teacher = gap.exp()
    teacher_sum = teacher.sum(-1, keepdim=True)
    logits -= logits.amax(-1, keepdim=True)
    label = logits.gather(1, labels[:, None])
    mean_gap = gap.sub_(logits).mul_(teacher).sum(-1, keepdim=True) / teacher_sum
    student_sum = logits.exp_().sum(-1, keepdim=True)
    logits /= student_sum
    logits -= teacher.mul_(weight / teacher_sum)
    logits.scatter_add_(1, labels[:, None], torch.full_like(label, weight - 1))
    soft, hard = mean_gap + (student_sum / teacher_sum).log(), student_sum.log() - label
    return (weight * soft + (1 - weight) * hard).sum()


def _policy_gradient_(logits: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """Sum over tokens of log q(y) - log p(y), and the gradient (log q(y) - log p(y)) ([y] - q).

    Args:
        labels: [n, 1] the drawn ids y.
        target: [n, V] log-probabilities up to a constant of each token.
    """
    logits -= logits.amax(-1, keepdim=True)
    own = logits.gather(1, labels)
    total = logits.exp_().sum(-1, keepdim=True)
    cost = own - total.log() - target.gather(1, labels) + target.logsumexp(-1, keepdim=True)
    logits *= -cost / total
    logits.scatter_add_(1, labels, cost)
    return cost.sum()


def _soft_cross_entropy_(logits: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """Sum over tokens of -sum_k share_k log q(id_k).

    Args:
        ids: [n, K] int64, an id may appear twice; shares: [n, K], summing to one.
    """
    logits -= logits.amax(-1, keepdim=True)
    expected = (shares * logits.gather(1, ids)).sum()
    total = logits.exp_().sum(-1, keepdim=True)
    logits /= total
    logits.scatter_add_(1, ids, -shares)
    return total.log().sum() - expected
