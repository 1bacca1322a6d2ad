"""What rounding alone changes in the answers of a model: the measure for two that should be one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ROUNDINGS_ALLOWED = 4  # times the measured noise: two orders of summation are below 1 of it apart


@torch.no_grad()
def rounding_noise(
    model: PreTrainedModel,
    answer: Callable[[], Tensor],
    before: Tensor,
    distance: Callable[[Tensor, Tensor], float],
) -> float:
    """How far an answer of a model moves when every product in it is rounded once more, by chance.

    The output of each linear layer is multiplied by 1 + e u, u uniform in [-1/2, 1/2], e the spacing of its
    dtype: Monte Carlo arithmetic (Parker 1997, UCLA CSD-970002). So depth, width, dtype and quantization
    count as they are in this model.

    Args:
        answer: runs the model.
        before: its answer.
        distance: of two answers.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def round_again(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(0)
        chance = torch.rand(output.shape, generator=generators[output.device], device=output.device)
        return (output.float() * (1 + torch.finfo(output.dtype).eps * (chance - 0.5))).to(output.dtype)

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    handles = [layer.register_forward_hook(round_again) for layer in layers]
    try:
        return distance(answer(), before)
    finally:
        for handle in handles:
            handle.remove()
