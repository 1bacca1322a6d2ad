"""Where the decoder layers and the matrices of a transformers model are, and how large it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.recipe import Size, Skipped
from eval.errors import UserError

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


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The list of decoder layers, the module that owns it and its name there.

    Raises:
        UserError: the model has no single list of `num_hidden_layers` modules.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    outermost = [f for f in found if not any(f[2] in set(o[2].modules()) for o in found if o is not f)]
    if len(outermost) != 1:
        raise UserError(
            f"model {type(model).__name__}",
            f"{len(outermost)} lists of {count} layers",
            "this pass needs a decoder with exactly one; leave it out of the recipe",
        )
    return outermost[0]


def layer_matrices(layer: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside a decoder layer, by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def left_out(model: nn.Module, touched: set[nn.Module], reason: str) -> list[Skipped]:
    """Modules that hold a matrix of their own and are not in `touched`."""
    held = [
        name
        for name, module in model.named_modules()
        if module not in touched and any(w.ndim > 1 for w in module.parameters(recurse=False))
    ]
    return [Skipped(module=name, reason=reason) for name in held]
