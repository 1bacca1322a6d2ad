"""Depth: drops the decoder layers whose absence raises the loss on training rows least.

Greedy, one layer at a time, never the first or the last (as in Gromov et al. 2024, "The Unreasonable
Ineffectiveness of the Deeper Layers", and Men et al. 2024, "ShortGPT": inner layers are the spare ones;
the loss itself is the yardstick here, which small models can afford).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import nn

from compress.anatomy import decoder_layers, size_of
from compress.calibrate import calibration_rows, mean_loss
from compress.recipe import Context, Pass, PassReport, Stage
from eval.errors import UserError
from eval.sections import Frozen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields of transformers configs with one entry per layer, and those that list layer numbers.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types")
LAYER_NUMBERS = ("mlp_only_layers", "cross_attention_layers", "moe_layers", "attn_layer_indices")


class DropLayers(Pass):
    stage = Stage.STRUCTURE

    class Options(Frozen):
        share: float = Field(0.25, gt=0, lt=1)  # of the layers
        rows: int = Field(32, gt=0)  # training rows that decide

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        before = size_of(model)
        depth = len(decoder_layers(model)[2])
        rows = calibration_rows(context.rows, self.options.rows, context.seed)
        count = max(1, round(self.options.share * depth))
        if count > depth - 2:
            raise UserError(
                "drop_layers.share",
                f"{self.options.share} is {count} of {depth} layers",
                "the first and the last stay: ask for a smaller share",
            )
        dropped = choose(model, rows, context.pad, count)
        kept = [i for i in range(depth) if i not in dropped]
        keep_layers(model, kept)
        return model, PassReport(
            name=self.name, before=before, after=size_of(model), facts={"dropped_layers": sorted(dropped)}
        )


def choose(model: PreTrainedModel, rows: list, pad: int, count: int) -> set[int]:
    """The layers to drop: each time the one that is missed least beside those dropped before."""
    layers = decoder_layers(model)[2]
    dropped: set[int] = set()
    for _ in range(count):
        losses = {}
        for i in set(range(1, len(layers) - 1)) - dropped:
            with bypassed([layers[j] for j in (*dropped, i)]):
                losses[i] = mean_loss(model, rows, pad)
        dropped.add(min(losses, key=lambda i: (losses[i], i)))
    return dropped


@contextmanager
def bypassed(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, each of `layers` hands on the hidden states that it is given, as if it were not there."""

    def hand_on(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(hand_on, with_kwargs=True).remove)
        yield


def keep_layers(model: PreTrainedModel, kept: list[int]) -> None:
    """Leaves only the layers `kept`, renumbered, so that the cache and the config agree with them."""
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
