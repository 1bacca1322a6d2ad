"""Where the matrices of a transformers model are, how large it is, and its weights in another format."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.recipe import Size, Skipped
from distill.models.layers import decoder_layers
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def size_of(model: nn.Module, dtype: torch.dtype | None = None) -> Size:
    """Size of a model in a plain floating-point format, stored in `dtype`; none: as it is in memory."""
    weights = list(model.parameters())  # each tied weight once
    return Size(
        parameters=sum(w.numel() for w in weights),
        nonzeros=sum(int(torch.count_nonzero(w)) for w in weights),
        bytes=stored_bytes(model, dtype),
    )


def stored_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors of the state dict, those of floating point in `dtype`; tied ones once."""

    def size(tensor: torch.Tensor) -> int:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.numel() * wanted.itemsize

    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    return sum({(t.data_ptr(), t.numel()): size(t) for t in tensors}.values())


def layer_matrices(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a decoder layer, by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def layer_inputs(model: PreTrainedModel) -> dict[str, int]:
    """Matrix inside the decoder layers -> its number of inputs: linear layers, and GPT-2's, stored [I, O]."""
    layers = decoder_layers(model)[2]
    inside = {module for layer in layers for module in layer.modules()}
    return {
        name: module.weight.shape[0 if isinstance(module, Conv1D) else 1]
        for name, module in model.named_modules()
        if module in inside and isinstance(module, nn.Linear | Conv1D)
    }


def check_groups(
    model: PreTrainedModel, group: int, thing: str, fix: str, names: Collection[str] | None = None
) -> None:
    """Refuses a model with a matrix whose rows do not divide into groups of `group` inputs.

    Args:
        names: of the matrices; none: all inside the layers.

    Raises:
        UserError: names the first such matrix.
    """
    for name, inputs in layer_inputs(model).items():
        if inputs % group and (names is None or name in names):
            raise UserError(thing, f"the {inputs} inputs of {name} are no multiple of {group}", fix)


def decoder_weights(model: PreTrainedModel) -> dict[str, int]:
    """Parameter -> its number of weights: all with two axes or more inside of the decoder layers.

    Experts that stand in one tensor of three axes are among them, though no linear layer holds them.
    """
    layers = set(decoder_layers(model)[2].parameters())
    return {name: w.numel() for name, w in model.named_parameters() if w in layers and w.ndim > 1}


def skipped_modules(model: nn.Module, touched: set[nn.Module], reason: str) -> list[Skipped]:
    """Modules that hold a matrix of their own and are not in `touched`."""
    held = [
        name
        for name, module in model.named_modules()
        if module not in touched and any(w.ndim > 1 for w in module.parameters(recurse=False))
    ]
    return [Skipped(module=name, reason=reason) for name in held]


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in `dtype`, changed in place; tied ones stay tied.

    Unlike `model.to`, it leaves alone what a checkpoint does not hold, such as the frequencies of rotary
    positions: reloaded, they are float32.
    """
    stored = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model
