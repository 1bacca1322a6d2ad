"""Depth: drops the decoder layers whose absence raises the loss on training rows least.

Greedy, one layer at a time, never the first or the last (as in Gromov et al. 2024, "The Unreasonable
Ineffectiveness of the Deeper Layers", and Men et al. 2024, "ShortGPT": inner layers are the spare ones;
here the loss itself decides, which small models can afford).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import nn

from compress.calibration import calibration_rows, mean_loss
from compress.model_size import size_of
from compress.recipe import Context, Pass, PassReport, Stage
from distill.models.layers import decoder_layers, keep_layers
from eval.core.config import Frozen
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
                f"at most {depth - 2} can go, as the first and the last stay: give a smaller share",
            )
        dropped = choose_layers(model, rows, context.pad, count)
        keep_layers(model, [i for i in range(depth) if i not in dropped])
        return model, PassReport(
            name=self.name, before=before, after=size_of(model), facts={"dropped_layers": sorted(dropped)}
        )


def choose_layers(model: PreTrainedModel, rows: list, pad: int, count: int) -> set[int]:
    """The layers to drop, chosen one by one: each time the one whose absence raises the loss least."""
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
    """Inside, each of `layers` returns its input hidden states, as if it were not there."""

    def skip(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(skip, with_kwargs=True).remove)
        yield
