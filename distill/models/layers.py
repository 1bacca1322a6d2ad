"""The decoder layers of a causal language model: where they are, which matter, a model of some of them."""

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

    It is found by structure, so that a family needs no entry anywhere: the outermost list of
    `num_hidden_layers` modules.

    Raises:
        UserError: the model has none, or several.
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
            "layers can be chosen of a decoder with exactly one",
        )
    return outermost[0]


def keep_layers(model: PreTrainedModel, kept: list[int]) -> None:
    """Leaves only the layers `kept`, renumbered, so that the cache and the config agree with them.

    Raises:
        UserError: the config of the family makes layers of another kind at the new places.
    """
    owner, name, layers = decoder_layers(model)
    config = model.config.get_text_config()
    for field in PER_LAYER:
        values = getattr(config, field, None)
        if isinstance(values, list) and len(values) == len(layers):
            setattr(config, field, [values[i] for i in kept])
    for field in LAYER_NUMBERS:
        if values := getattr(config, field, None):
            setattr(config, field, [kept.index(i) for i in values if i in kept])
    setattr(owner, name, nn.ModuleList(layers[i] for i in kept))
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            if "layer_idx" in vars(module):  # transformers' name for the module's place in the cache
                vars(module)["layer_idx"] = new
    config.num_hidden_layers = len(kept)
    _check_config(model)


def _check_config(model: PreTrainedModel) -> None:
    """Holds the model against one that is made of its config: it would not load otherwise."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(type(model.config).from_dict(model.config.to_dict()))
        wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
        found = "its config makes other layers at these places"
    except ValueError as error:
        wanted, found = {}, " ".join(str(error).split())[:200]
    if wanted != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        fix = "keep all layers of this family"
        raise UserError(f"layers of model type {model.config.model_type!r}", found, fix)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` layers, evenly spaced, the first and the last among them.

    As in Shleifer and Rush 2020 (arXiv:2010.13002): 0, 6 and 11 of twelve.
    """
    return sorted({round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)})


def most_influential(model: PreTrainedModel, batches: list[Batch], wanted: int) -> list[int]:
    """The `wanted` layers of the greatest block influence on these batches, in their order."""
    influence = block_influence(model, batches).tolist()
    return sorted(sorted(range(len(influence)), key=lambda i: (-influence[i], i))[:wanted])


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: list[Batch]) -> Tensor:
    """[L] float64: 1 - cosine of what a layer is given and what it gives, the mean over all real tokens.

    Men et al. 2024, "ShortGPT" (arXiv:2403.03853), equation 1.
    """
    layers = list(decoder_layers(model)[2])
    total, tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    for batch in batches:
        moved = batch.to(model.device)
        with _capture_changes(layers) as found:
            model(**moved.inputs, use_cache=False)
        real = moved.attention_mask.bool()
        total += torch.stack([change[real].double().sum().cpu() for change in found])
        tokens += int(real.sum())
    return total / tokens


@contextmanager
def _capture_changes(layers: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Fills a list with 1 - cosine [B, T] of each layer, in the order in which they run."""
    found: list[Tensor] = []

    def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        made = output[0] if isinstance(output, tuple) else output
        found.append(1 - cosine_similarity(given.float(), made.float(), dim=-1))

    handles = [layer.register_forward_hook(compare, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
