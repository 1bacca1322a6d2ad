"""The decoder layers of a causal language model: where they are, which are influential, keeping some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from eval.core.documents import Batch
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of transformers configs with one entry per layer, and those that list layer numbers.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types")
LAYER_NUMBERS = ("mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices")


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that owns the decoder layers, their list's name there, and the list.

    Found by structure, without a table of families: the outermost list of `num_hidden_layers` modules.

    Raises:
        UserError: the model has none, or several.
    """
    count = model.config.get_text_config().num_hidden_layers
    candidates = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    outermost = [
        c for c in candidates if not any(c[2] in set(o[2].modules()) for o in candidates if o is not c)
    ]
    if len(outermost) != 1:
        raise UserError(
            f"model {type(model).__name__}",
            f"{len(outermost)} lists of {count} layers, expected one",
            "leave out what counts layers: student.layers, train.exits, the pass drop_layers",
        )
    return outermost[0]


def keep_layers(model: PreTrainedModel, indices: list[int]) -> None:
    """Keeps only the layers at `indices`, and renumbers them in the cache and in the config.

    Raises:
        UserError: the config of the family builds layers of another kind at the new positions.
    """
    owner, name, layers = decoder_layers(model)
    config = model.config.get_text_config()
    for field in PER_LAYER:
        values = getattr(config, field, None)
        if isinstance(values, list) and len(values) == len(layers):
            setattr(config, field, [values[i] for i in indices])
    for field in LAYER_NUMBERS:
        if values := getattr(config, field, None):
            setattr(config, field, [indices.index(i) for i in values if i in indices])
    setattr(owner, name, nn.ModuleList(layers[i] for i in indices))
    for new, old in enumerate(indices):
        for module in layers[old].modules():
            if "layer_idx" in vars(module):  # in transformers: the module's index in the cache
                vars(module)["layer_idx"] = new
    config.num_hidden_layers = len(indices)
    _check_config(model)


def _check_config(model: PreTrainedModel) -> None:
    """Compares the model with one built from its config: otherwise it could not be loaded."""
    from eval.engines.torch import model_class

    config = type(model.config).from_dict(model.config.to_dict())
    try:
        with torch.device("meta"):
            rebuilt = model_class(config).from_config(config)
        shapes = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
        problem = "its config builds other layers at these positions"
    except ValueError as error:
        shapes, problem = {}, " ".join(str(error).split())[:200]
    if shapes != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        fix = "keep all layers of this family: without student.layers, and without the pass drop_layers"
        raise UserError(f"layers of model type {model.config.model_type!r}", problem, fix)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` among `count` layers, evenly spaced, with the first and the last.

    As in Shleifer and Rush 2020 (arXiv:2010.13002): 0, 6 and 11 of twelve.
    """
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)})


def most_influential(model: PreTrainedModel, batches: list[Batch], wanted: int) -> list[int]:
    """Numbers of the `wanted` layers of greatest block influence on these batches, ascending."""
    influence = block_influence(model, batches).tolist()
    return sorted(sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:wanted])


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """[L] float64: 1 - cosine between input and output of a layer, averaged over all real tokens.

    Men et al. 2024, "ShortGPT" (arXiv:2403.03853), equation 1.
    """
    layers = list(decoder_layers(model)[2])
    total, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    for batch in batches:
        moved = batch.to(model.device)
        with _capture_changes(layers) as changes:
            model(**moved.inputs, use_cache=False)
        real = moved.attention_mask.bool()
        total += torch.stack([change[real].double().sum().cpu() for change in changes])
        tokens += int(real.sum())
    return total / tokens


@contextmanager
def _capture_changes(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects 1 - cosine [B, T] of input and output of each layer, in the order in which they run."""
    changes: list[Tensor] = []

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        changes.append(1 - cosine_similarity(before.float(), after.float(), dim=-1))

    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        yield changes
    finally:
        for handle in handles:
            handle.remove()
