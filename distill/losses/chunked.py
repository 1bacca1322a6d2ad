"""The loss of a batch from hidden states: heads, loss and gradient are formed chunk by chunk.

No [tokens, vocabulary] tensor of the whole batch ever exists. The gradient is formed in the forward pass,
where the logits of a chunk are at hand, and kept as that of the hidden states [N, D] and of the head [V, D].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.losses.divergences import check_target, distillation_loss
from distill.losses.teacher_output import Dense, Sampled, States, Target, TopK, cut_vocabulary
from distill.models.lm_head import Head, is_narrow
from eval.core.sections import Loss

CHUNK_BYTES = 2**26  # of the float32 logits of one chunk: the products of the heads are as fast as whole ones
BLOCK_BYTES = 2**20  # of those that stay in a core's cache while they are worked on
Answer = Tensor | Sampled | TopK | None


def chunk_bounds(tokens: int, size: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Starts and stops of parts whose float32 logits take `size` bytes; one token at least."""
    step = max(1, size // (4 * vocabulary))
    yield from ((start, min(tokens, start + step)) for start in range(0, tokens, step))


def slice_target(target: Target | None, start: int, stop: int) -> Answer:
    """What a target says of the tokens start to stop, as a loss takes it."""
    if isinstance(target, Dense | States):
        return target.logits(start, stop)
    return None if target is None else target.few(start, stop)


def sparse_(logits: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    """Sum over tokens of -sum_k share_k log q(id_k); the logits [n, V] become its gradient.

    Args:
        ids: [n, K] int64, an id may stand twice; shares: [n, K], summing to one.
    """
    logits -= logits.amax(-1, keepdim=True)
    met = (shares * logits.gather(1, ids)).sum()
    total = logits.exp_().sum(-1, keepdim=True)
    logits /= total
    logits.scatter_add_(1, ids, -shares)
    return total.log().sum() - met


def dense_(logits: Tensor, labels: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """Sum over tokens of (1 - w) CE + w KL(p || q) at T = 1; the logits [n, V] become its gradient.

    Two exponentials an entry in all: both distributions are made once, for the value and for the gradient
    q - w p - (1 - w) [label]. teacher: [n, V], log-probabilities up to a constant of each token.
    """
    gap = teacher - teacher.amax(-1, keepdim=True)
    other = gap.exp()
    mass = other.sum(-1, keepdim=True)
    logits -= logits.amax(-1, keepdim=True)
    label = logits.gather(1, labels[:, None])
    inner = gap.sub_(logits).mul_(other).sum(-1, keepdim=True) / mass
    total = logits.exp_().sum(-1, keepdim=True)
    logits /= total
    logits -= other.mul_(weight / mass)
    logits.scatter_add_(1, labels[:, None], torch.full_like(label, weight - 1))
    soft, hard = inner + (total / mass).log(), total.log() - label
    return (weight * soft + (1 - weight) * hard).sum()


def _mixed_(logits: Tensor, labels: Tensor, target: Tensor | Sampled, weight: float) -> Tensor:
    """The same for either form of a target, at the temperature that logits and target have."""
    if isinstance(target, Tensor):
        return dense_(logits, labels, target, weight)
    drawn = weight * target.counts / target.counts.sum(-1, keepdim=True)
    shares = torch.cat([drawn, torch.full_like(drawn[:, :1], 1 - weight)], 1)
    return (
        sparse_(logits, torch.cat([target.ids, labels[:, None]], 1), shares) - weight * target.entropy.sum()
    )


def _by_autograd_(logits: Tensor, labels: Tensor, target: Answer, config: Loss) -> Tensor:
    with torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        loss = distillation_loss(leaf, labels, target, config)
        (found,) = torch.autograd.grad(loss, leaf)
    logits.copy_(found)
    return loss.detach()


def gradient_(logits: Tensor, labels: Tensor, target: Answer, config: Loss) -> Tensor:
    """`losses.distillation_loss` of float32 logits [n, V], which become its gradient.

    The gradient of the forward KL and of CE is written out, that of the others left to autograd.
    """
    weight, temperature = config.weight, config.temperature
    if target is None or weight == 0:
        return sparse_(logits, labels[:, None], torch.ones_like(logits[:, :1]))
    if config.divergence != "forward_kl" or isinstance(target, TopK):
        return _by_autograd_(logits, labels, target, config)
    if temperature == 1:
        return _mixed_(logits, labels, target, weight)
    hard = logits.clone()
    tempered = target / temperature if isinstance(target, Tensor) else target
    soft = _mixed_(logits.div_(temperature), labels, tempered, 1.0) * temperature**2
    logits *= weight * temperature
    loss = sparse_(hard, labels[:, None], torch.ones_like(hard[:, :1]))
    logits.add_(hard, alpha=1 - weight)
    return (1 - weight) * loss + weight * soft


def _shaped_(logits: Tensor, head: Head, labels: Tensor, target: Answer, config: Loss) -> Tensor:
    """The summed loss of the products of a head [n, V], which become its gradient by them."""
    slope = head.shape_(logits)
    loss = gradient_(logits, labels, target, config)
    if slope is not None:
        logits *= slope
    elif head.scale != 1:
        logits *= head.scale
    return loss


def _blocks_(logits: Tensor, head: Head, labels: Tensor, target: Answer, config: Loss) -> Tensor:
    """The same, on a CPU block by block: what is worked on stays in the cache."""
    if logits.is_cuda:
        return _shaped_(logits, head, labels, target, config)
    loss = torch.zeros(())
    for start, stop in chunk_bounds(len(logits), BLOCK_BYTES, logits.shape[1]):
        part = target
        if target is not None:
            part = target[start:stop] if isinstance(target, Tensor) else target.few(start, stop)
        loss += _shaped_(logits[start:stop], head, labels[start:stop], part, config)
    return loss


def product(one: Tensor, other: Tensor) -> Tensor:
    """float32 product of a float32 matrix with another, on a GPU in the dtype of the other."""
    if is_narrow(other):
        return torch.mm(one.to(other.dtype), other, out_dtype=torch.float32)
    return torch.mm(one, other.float())


@dataclass
class Gradients:
    """Sums over the chunks, in float32 for the head; None where a gradient is not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def add(self, start: int, logits: Tensor, hidden: Tensor, head: Head) -> None:
        """Takes the gradient of the products [n, V] of the n hidden states from `start` on."""
        if self.hidden is not None:
            self.hidden[start : start + len(hidden)] = product(logits, head.weight)
        if self.weight is not None and is_narrow(hidden):
            self.weight += product(logits.mT, hidden)
        elif self.weight is not None:
            self.weight.addmm_(logits.mT, hidden.float())
        if self.bias is not None:
            self.bias += logits.sum(0)


def _chunk(
    found: Gradients,
    start: int,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    target: Target | None,
    config: Loss,
) -> Tensor:
    """The summed loss of the tokens from `start` on, their gradient added; its logits end with it."""
    logits = head.product(hidden)
    told = slice_target(target, start, start + len(hidden))
    loss = _blocks_(logits, head, labels, told, config)
    found.add(start, logits, hidden, head)
    return loss


class _Chunked(torch.autograd.Function):
    """Loss and gradient of a batch, in one pass over its chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        head, labels, target, config = rest
        found = Gradients(
            torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None,
            None
            if bias is None or not ctx.needs_input_grad[2]
            else torch.zeros_like(bias, dtype=torch.float32),
        )
        ready, total = head.ready(hidden.dtype), torch.zeros((), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start, stop in chunk_bounds(len(hidden), CHUNK_BYTES, len(weight)):
                part = slice(start, stop)
                total += _chunk(found, start, hidden[part], ready, labels[part], target, config)
        ctx.found = found
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.found = ctx.found, None  # not held here, a gradient becomes `.grad` without a copy
        grads = [found.hidden, found.weight, found.bias]
        return *(None if grad is None else grad.mul_(scale) for grad in grads), None, None, None, None


def chunked_loss(hidden: Tensor, head: Head, labels: Tensor, target: Target | None, config: Loss) -> Tensor:
    """The sum that `losses.distillation_loss` gives for head(hidden), and its gradient, in little memory.

    Args:
        hidden: [N, D] of the student at the N valid tokens.
        labels: [N] the tokens themselves.
        target: what the teacher says of them; None for labels alone.

    Raises:
        UserError: the divergence cannot be had from this form of targets.
    """
    check_target(target, config)
    target = None if target is None else cut_vocabulary(target, head.weight.shape[0])
    return _Chunked.apply(hidden, head.weight, head.bias, head, labels, target, config)
