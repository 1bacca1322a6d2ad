"""Unstructured or n:m sparsity by Wanda (Sun et al. 2023): weight magnitude times input norm, row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.calibration import Walk, calibration_rows
from compress.model_size import decoder_weights, layer_matrices, size_of, skipped_modules
from compress.recipe import Context, Pass, PassReport, Skipped, Stage
from compress.tensors.sparsity import keep_n_of_m, keep_rows, wanda_scores
from eval.core.config import Frozen
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Wanda(Pass):
    stage = Stage.SPARSITY

    class Options(Frozen):
        sparsity: float = Field(0.5, gt=0, lt=1)  # share of zeros in every row
        pattern: str | None = Field(None, pattern=r"^[1-9]\d*:[1-9]\d*$")  # n:m instead, as in 2:4
        rows: int = Field(32, gt=0)  # training rows that calibrate

        @model_validator(mode="after")
        def one_of_two(self) -> Self:
            if self.pattern is not None:
                n, m = (int(part) for part in self.pattern.split(":"))
                if n >= m:
                    raise ValueError(f"pattern {self.pattern} keeps everything; give n below m")
                if "sparsity" in self.model_fields_set:
                    raise ValueError("give `sparsity` or `pattern`, not both")
            return self

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        before = size_of(model, context.dtype)
        rows = calibration_rows(context.rows, self.options.rows, context.seed)
        seen: set[nn.Module] = set()
        reached = 0
        skipped: list[Skipped] = []
        names = {module: name for name, module in model.named_modules()}
        walk = Walk(model, rows, context.pad)
        for i, layer in enumerate(walk.layers):  # in turn: the inputs of a layer come from pruned layers
            matrices = {names[m]: m for m in layer_matrices(layer).values()}
            prunable = {name: m for name, m in matrices.items() if m.in_features % self._group == 0}
            skipped += [
                Skipped(
                    module=name,
                    reason=f"{m.in_features} inputs do not divide into {self.options.pattern}",
                )
                for name, m in matrices.items()
                if name not in prunable
            ]
            for name, norms in walk.norms(i, prunable).items():
                weight = prunable[name].weight
                weight.data *= self._mask(wanda_scores(weight, norms.to(weight.device)))
            walk.leave(i)
            reached += sum(m.weight.numel() for m in prunable.values())
            seen |= set(matrices.values())
            context.report((i + 1) / len(walk.layers))
        if len(skipped) == len(seen):
            raise UserError("wanda", "no linear layer that it can prune", "leave the pass out of the recipe")
        skipped += skipped_modules(model, seen, "not a linear layer of the decoder")
        named = sum(decoder_weights(model).values())
        return model, PassReport(
            name=self.name,
            before=before,
            after=size_of(model, context.dtype),
            named=named,
            reached=reached,
            skipped=skipped,
        )

    @property
    def _group(self) -> int:
        """Inputs of a row that are compared with each other, of which their number must be a multiple."""
        return 1 if self.options.pattern is None else int(self.options.pattern.split(":")[1])

    def _mask(self, scores: Tensor) -> Tensor:
        """[O, I] bool: the weights that stay."""
        if self.options.pattern is None:
            return keep_rows(scores, self.options.sparsity)
        n, m = (int(part) for part in self.options.pattern.split(":"))
        return keep_n_of_m(scores, n, m)
