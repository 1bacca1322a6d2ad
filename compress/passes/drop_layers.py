"""Depth: drops the decoder layers that are missed least on training rows, never the first or the last.

Where few evaluations can answer, the loss without a layer decides, one layer after the other (as in Gromov et
al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers"). A deep model would need whole evaluations
in a number that grows with the square of its depth, 200 for a quarter of 30 layers: there the block influence
of ShortGPT decides (Men et al. 2024, arXiv:2403.03853), which one forward pass gives of all layers. It is
measured again after every quarter of the layers to drop, so that the cost grows with the depth alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field
from torch import nn

from compress.calibration import calibration_rows, mean_loss
from compress.model_size import size_of
from compress.recipe import Context, Pass, PassReport, Stage
from distill.models.layers import block_influence, decoder_layers, keep_layers
from eval.core.config import Frozen
from eval.core.documents import batches, tokens_per_batch
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVALUATIONS = 16  # whole ones at most, of the model on all rows, if the loss is to decide
ROUNDS = 4  # in which layers of little influence go


class DropLayers(Pass):
    stage = Stage.STRUCTURE

    class Options(Frozen):
        share: float = Field(0.25, gt=0, lt=1, description="share of the layers that go")
        rows: int = Field(32, gt=0, description="training rows that decide")

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        before = size_of(model, context.dtype)
        depth = len(decoder_layers(model)[2])
        rows = calibration_rows(context.rows, self.options.rows, context.seed)
        dropped = choose_layers(model, rows, context.pad, self._count(depth))
        keep_layers(model, [i for i in range(depth) if i not in dropped])
        return model, PassReport(
            name=self.name,
            before=before,
            after=size_of(model, context.dtype),
            facts={"dropped_layers": sorted(dropped)},
        )

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        depth = len(decoder_layers(model)[2])
        keep_layers(model, list(range(depth - self._count(depth))))
        return model

    def _count(self, depth: int) -> int:
        """How many of `depth` layers go.

        Raises:
            UserError: more than all between the first and the last.
        """
        count = max(1, round(self.options.share * depth))
        if count > depth - 2:
            raise UserError(
                "drop_layers.share",
                f"{self.options.share} is {count} of {depth} layers",
                f"at most {depth - 2} can go, as the first and the last stay: give a smaller share",
            )
        return count


def choose_layers(model: PreTrainedModel, rows: list, pad: int, count: int) -> set[int]:
    """The numbers of the layers to drop: by the loss if that takes few evaluations, else by influence."""
    inner = len(decoder_layers(model)[2]) - 2
    evaluations = sum(inner - done for done in range(count))
    return (by_loss if evaluations <= EVALUATIONS else by_influence)(model, rows, pad, count)


def by_loss(model: PreTrainedModel, rows: list, pad: int, count: int) -> set[int]:
    """One by one: each time the layer whose absence raises the loss least."""
    layers = decoder_layers(model)[2]
    dropped: set[int] = set()
    for _ in range(count):
        losses = {}
        for i in set(range(1, len(layers) - 1)) - dropped:
            with bypassed([layers[j] for j in (*dropped, i)]):
                losses[i] = mean_loss(model, rows, pad)
        dropped.add(min(losses, key=lambda i: (losses[i], i)))
    return dropped


def by_influence(model: PreTrainedModel, rows: list, pad: int, count: int) -> set[int]:
    """Those of least block influence, in at most `ROUNDS` rounds: each measures it without those gone."""
    layers = decoder_layers(model)[2]
    size = tokens_per_batch(model.config.get_text_config().vocab_size, model.device)
    inputs, dropped, rounds = list(batches(rows, pad, size)), set[int](), min(ROUNDS, count)
    for done in range(rounds):
        with bypassed([layers[i] for i in dropped]):
            influence = block_influence(model, inputs).tolist()
        left = sorted(set(range(1, len(layers) - 1)) - dropped, key=lambda i: (influence[i], i))
        dropped |= set(left[: (done + 1) * count // rounds - len(dropped)])
    return dropped


@contextmanager
def bypassed(layers: list[nn.Module]) -> Iterator[None]:
    """Inside, each of `layers` returns its input hidden states, as if it were not there.

    It is computed for the first batch alone, to see in which form its family returns hidden states.
    """

    def skip(own: Callable[..., Any], rest: list[Any], *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not rest:
            output = own(*args, **kwargs)
            rest.append(output[1:] if isinstance(output, tuple) else None)
        return hidden if rest[0] is None else (hidden, *rest[0])

    for layer in layers:
        assert "forward" not in vars(layer), "its forward is replaced already"
        layer.forward = partial(skip, layer.forward, [])
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
