"""ONNX graphs for CPU targets, run by ONNX Runtime: float32, int8, or int4.

- `int8` and `int4`: levels around zero, one scale for `group_size` inputs (`MatMulNBits`); activations are
  rounded to 8 bits in the same groups.
- `int8-dynamic`: one scale for each output; activations are rounded to 8 bits by the least and the largest of
  the whole batch, so that what is computed for a token depends a little on those beside it.

Embeddings and head have the format of the other matrices, and are one matrix where the model ties them.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from compress.calibration import check_batch, check_export
from compress.engine_files import EngineFiles
from compress.model_size import check_groups, size_of, skipped_modules
from compress.onnx_graph import (
    ARCHITECTURES,
    MODEL,
    build,
    matrices,
    quantize,
    restored,
    save,
    stored_bytes,
)
from compress.recipe import Context, Grid, Pass, PassReport, Size, Stage
from compress.tensors.quant_error import INT4_STEP, INT8_STEP, check_rounding
from eval.core.config import Frozen
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOUNDS = {"int8": INT8_STEP, "int8-dynamic": INT8_STEP, "int4": INT4_STEP}


class OnnxRuntime(Pass):
    stage = Stage.EXPORT
    engine = "onnxruntime"
    last = True
    needs = ("onnxruntime", "onnxruntime_genai", "onnx", "onnx_ir")

    class Options(Frozen):
        weights: Literal["fp32", "int8", "int8-dynamic", "int4"] = Field(
            description="of the matrices; `int8-dynamic` rounds activations to 8 bits too"
        )
        group_size: Literal[16, 32, 64, 128, 256] = Field(
            32, description="inputs of a row that share one scale"
        )

        @model_validator(mode="after")
        def fits_together(self) -> Self:
            if not self.in_groups and "group_size" in self.model_fields_set:
                raise ValueError("group_size needs weights: int8 or int4")
            return self

        @property
        def in_groups(self) -> bool:
            return self.weights in ("int8", "int4")

    def grid_problem(self, grid: Grid) -> str | None:
        own = Grid({"int4": 4}.get(self.options.weights, 8), self.options.group_size)
        if self.options.weights == "fp32" or (self.options.in_groups and own.holds(grid)):
            return None
        return f"onnxruntime rounds to levels of {own if self.options.in_groups else 'its own'}"

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        if (name := type(model).__name__) not in ARCHITECTURES:
            fix = f"leave the pass out of the recipe: it takes {', '.join(ARCHITECTURES)}"
            raise UserError("pass onnxruntime", f"no ONNX graph of a {name} was compared with it", fix)
        if window := getattr(model.config, "sliding_window", None):
            fix = "leave the pass out of the recipe for this model"
            raise UserError("pass onnxruntime", f"a sliding window of {window} tokens, which it has not", fix)
        if self.options.in_groups:
            fix = "give a group size that divides all of them, or weights: int8-dynamic"
            check_groups(model, self.options.group_size, "onnxruntime.group_size", fix)
        return model

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[EngineFiles, PassReport]:
        before, weights = size_of(model, context.dtype), self.options.weights
        plain = self._plain(model, context)
        originals = matrices(plain)
        elements, worst, zeroed = sum(prod(m.shape) for m in originals.values()), 0.0, 0
        quantized, skipped = plain, skipped_modules(model, set(), "the recipe asks for float32")
        if weights != "fp32":
            quantized, skipped = quantize(plain, weights, self.options.group_size), []
            group = self.options.group_size if self.options.in_groups else None
            for name, matrix in originals.items():
                old, new = torch.from_numpy(matrix.T.copy()), restored(quantized, name, weights)
                worst = max(worst, check_rounding(name, old, new, group, BOUNDS[weights]))
                zeroed += int(torch.count_nonzero(old)) - int(torch.count_nonzero(new))
        result = EngineFiles(self.engine, context.scratch, model)
        save(quantized, result.folder)
        every = sum(w.numel() for w in model.parameters() if w.ndim > 1)
        low_bit = 0 if weights == "fp32" else elements
        after = Size(
            parameters=before.parameters,
            nonzeros=before.nonzeros - zeroed,
            bytes=stored_bytes(quantized),
            low_bit=low_bit,
        )
        named = 0 if weights == "fp32" else every
        facts = {"weights": weights, "matrices": len(originals), "worst_rounding": worst}
        report = PassReport(
            name=self.name,
            before=before,
            after=after,
            named=named,
            reached=low_bit,
            skipped=skipped,
            facts=facts,
        )
        return result, report

    def _plain(self, model: PreTrainedModel, context: Context) -> Any:
        """The float32 graph: built once for a model, and checked to answer as it does."""
        import onnx

        folder = context.scratch / "onnx-fp32"
        if not folder.is_dir():
            exported = EngineFiles(self.engine, context.scratch, model)
            save(build(model, context.tokenizer, context.scratch), exported.folder)
            check_export("ONNX graph", model, exported, check_batch(context.rows, context.pad))
            exported.folder.rename(folder)
        return onnx.load(folder / MODEL)
