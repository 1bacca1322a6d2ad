"""Where the matrices of a transformers model are, and how large it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.recipe import Size, Skipped
from distill.models.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def size_of(model: nn.Module) -> Size:
    """Size of a model in a plain floating-point format."""
    weights = list(model.parameters())  # each tied weight once
    return Size(
        parameters=sum(w.numel() for w in weights),
        nonzeros=sum(int(torch.count_nonzero(w)) for w in weights),
        bytes=stored_bytes(model),
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of the state dict; tied ones once."""
    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


def layer_matrices(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a decoder layer, by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


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
