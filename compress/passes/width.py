"""Width: FFN channels, attention heads and hidden size, the least important on calibration rows cut out.

Importance is the squared norm of what a channel adds to the outputs of the matrices that read it (of a
head: the sum over its channels). So Minitron prunes by activations (Muralidharan et al. 2024,
arXiv:2407.14679); here the weights that read them count too. A key-value head goes with the queries that
share it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from compress.calibration import (
    calibration_rows,
    check_batch,
    check_same_answers,
    input_norms,
    log_probs,
)
from compress.model_size import size_of
from compress.recipe import Context, Pass, PassReport, Stage
from compress.width import (
    Axes,
    Matrix,
    cut,
    find_axes,
    kept_by_layer,
    layer_readers,
    masked,
    output_energy,
    readers,
    size_in_config,
    strongest,
)
from eval.core.config import Frozen
from eval.core.documents import batches
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


KINDS = ("ffn", "heads", "hidden")  # in this order


class Width(Pass):
    stage = Stage.STRUCTURE

    class Options(Frozen):
        ffn: float = Field(
            0.0, ge=0, lt=1, description="share of the channels of every feed-forward network that goes"
        )
        heads: float = Field(
            0.0, ge=0, lt=1, description="share of the key-value heads that goes, each with its queries"
        )
        hidden: float = Field(0.0, ge=0, lt=1, description="share of the hidden size that goes")
        multiple: int = Field(
            64, gt=0, description="what is left of the channels and of the hidden size divides by it"
        )
        rows: int = Field(32, gt=0, description="training rows that decide")

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        before = size_of(model, context.dtype)
        sizes: dict[str, list[int]] = {}
        kinds = [kind for kind in KINDS if getattr(self.options, kind) > 0]
        wanted = {kind: self._wanted(kind, size_in_config(model, kind)) for kind in kinds}
        for i, (kind, size) in enumerate(wanted.items()):  # each measured on what the ones before have left
            sizes[kind] = [size_in_config(model, kind), size]
            model = self._narrow(model, context, kind, size)
            context.report((i + 1) / len(wanted))
        return model, PassReport(
            name=self.name, before=before, after=size_of(model, context.dtype), facts={"sizes": sizes}
        )

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        for kind in KINDS:
            if getattr(self.options, kind) > 0:
                config, _ = find_axes(model, kind, self._wanted(kind, size_in_config(model, kind)))
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(config)
        return model

    def _wanted(self, kind: str, size: int) -> int:
        """What is left of a size: the nearest multiple.

        Raises:
            UserError: none lies below the size.
        """
        share, step = getattr(self.options, kind), 1 if kind == "heads" else self.options.multiple
        wanted = round(size * (1 - share) / step) * step
        if not 0 < wanted < size:
            left = f"{share} of {size} leaves {size * (1 - share):g}"
            problem = f"{left}, whose nearest multiple of {step} is {wanted}"
            fix = "give another share" if step == 1 else "give another share, or a smaller `multiple`"
            raise UserError(f"width.{kind}", problem, fix)
        return wanted

    def _narrow(self, model: PreTrainedModel, context: Context, kind: str, size: int) -> PreTrainedModel:
        config, axes = find_axes(model, kind, size)
        modules = readers(model, axes) if kind == "hidden" else layer_readers(model, axes)
        energies = self._energies(model, context, modules)
        if kind == "hidden":
            shares = [energy / energy.sum() for energy in energies.values()]  # each reader counts the same
            return cut(model, config, axes, {"": strongest(sum(shares[1:], start=shares[0]), size)})
        kept = kept_by_layer(model, axes, energies, size)
        narrow = cut(model, config, axes, kept)
        check_same(masked(model, axes, kept), narrow, context, axes)
        return narrow

    def _energies(
        self, model: PreTrainedModel, context: Context, modules: dict[str, Matrix]
    ) -> dict[str, Tensor]:
        rows = calibration_rows(context.rows, self.options.rows, context.seed)
        moved = (batch.to(model.device) for batch in batches(rows, context.pad))
        runs = [(b.attention_mask, partial(model, **b.inputs, use_cache=False)) for b in moved]
        norms = input_norms(modules, runs)
        return {name: output_energy(module, norms[name]) for name, module in modules.items()}


def check_same(whole: PreTrainedModel, narrow: Any, context: Context, axes: Axes) -> None:
    """Compares a cut model with the whole one in which nothing reads what was cut."""
    batch = check_batch(context.rows, context.pad)
    real = batch.attention_mask.bool()
    before, after = log_probs(whole, batch)[real], log_probs(narrow, batch)[real]
    check_same_answers(whole, batch, before, after, axes.kind)
