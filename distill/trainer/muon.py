"""Muon: momentum whose matrices are made orthogonal before each step, many matrices at once."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer

# The quintic iteration of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TINY = 1e-7
STACKED = 1 << 24  # numbers of one stack of matrices, at most; a larger matrix stands alone


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) with Nesterov momentum and decoupled decay, as `torch.optim.Muon` has it.

    What differs: matrices of one shape are made orthogonal together, [N, A, B]; a weight of three axes is
    as many matrices as it is long (the experts of a layer); and `dtype` is that of the products, which
    torch fixes to bf16: a CPU without bf16 products takes 40 times as long for them as for float32.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for weight in (p for group in self.param_groups for p in group["params"]):
            assert weight.ndim in (2, 3), f"a matrix or a stack of them, not {tuple(weight.shape)}"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for stack in _stacks(weights):
                updates = [self._momentum(p, group["momentum"]).view(-1, *p.shape[-2:]) for p in stack]
                directions = orthogonalize(torch.cat(updates), self.dtype)
                rows, columns = stack[0].shape[-2:]
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                lengths = [len(update) for update in updates]
                for weight, direction in zip(stack, directions.split(lengths), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(direction.view_as(weight), alpha=-rate)

    def _momentum(self, weight: nn.Parameter, momentum: float) -> torch.Tensor:
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight.grad)
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """About U Vᵀ of each matrix U S Vᵀ: singular values between 0.7 and 1.2 in place of S.

    Args:
        matrices: [N, A, B].
        dtype: of the products.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=TINY)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _stacks(weights: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """The weights by shape of their matrices, device and dtype, in stacks of `STACKED` numbers."""
    kinds: dict[tuple[torch.Size, torch.device, torch.dtype], list[nn.Parameter]] = {}
    for weight in weights:
        kinds.setdefault((weight.shape[-2:], weight.device, weight.dtype), []).append(weight)
    for kind in kinds.values():
        stack, numbers = list[nn.Parameter](), 0
        for weight in kind:
            if stack and numbers + weight.numel() > STACKED:
                yield stack
                stack, numbers = [], 0
            stack.append(weight)
            numbers += weight.numel()
        yield stack
