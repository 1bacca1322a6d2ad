"""NF4 (Dettmers et al. 2023, QLoRA) or LLM.int8 (Dettmers et al. 2022) by bitsandbytes, for GPU targets.

Saved in transformers' own quantized format: `AutoModelForCausalLM.from_pretrained` loads it, on a CPU too,
where it is slower than float32.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.model_size import (
    cast_weights,
    check_groups,
    decoder_weights,
    size_of,
    skipped_modules,
    stored_bytes,
)
from compress.recipe import Context, Grid, Pass, PassReport, Size, Stage
from compress.tensors.quant_error import HALF_SUBNORMAL, INT8_ROUNDED, NF4_GAP, check_rounding
from eval.core.config import Frozen
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # weights that share one scale in NF4


class BitsAndBytes(Pass):
    stage = Stage.PRECISION
    last = True
    needs = ("bitsandbytes",)

    class Options(Frozen):
        format: Literal["nf4", "int8"] = Field(description="of the matrices: 4 bits, normal float; or 8 bits")

    def grid_problem(self, grid: Grid) -> str | None:
        return f"bitsandbytes has levels of its own for {self.options.format}"

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.options.format == "nf4":
            fix = f"give the model dimensions that are multiples of {BLOCK}, or take another format"
            check_groups(model, BLOCK, "bitsandbytes.format: nf4", fix)
        return model

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        from distill.models.quantized import dequantize, quantized_layers

        before = size_of(model, context.dtype)
        model = cast_weights(model, context.dtype)
        quantized = quantize(model, self.options.format)
        inside, reached = decoder_weights(model), 0
        worst, zeroed, low_bit, touched = 0.0, 0, 0, set[nn.Module]()
        for name, module in quantized_layers(quantized).items():
            old, new = original_matrix(model, name), dequantize(module)
            nf4_bound = NF4_GAP + torch.finfo(model.dtype).eps / 2  # restored in the model's own dtype
            group, bound = (BLOCK, nf4_bound) if self.options.format == "nf4" else (None, INT8_ROUNDED)
            worst = max(worst, check_rounding(name, old, new, group, bound, HALF_SUBNORMAL))
            zeroed += int(torch.count_nonzero(old)) - int(torch.count_nonzero(new))
            low_bit += old.numel()
            reached += inside.get(f"{name}.weight", 0)
            touched.add(module)
        after = Size(
            parameters=before.parameters,
            nonzeros=before.nonzeros - zeroed,
            bytes=stored_bytes(quantized),
            low_bit=low_bit,
        )
        return quantized, PassReport(
            name=self.name,
            before=before,
            after=after,
            named=sum(inside.values()),
            reached=reached,
            skipped=skipped_modules(quantized, touched, "left in full precision by transformers"),
            facts={"format": self.options.format, "matrices": len(touched), "worst_rounding": worst},
        )


def quantize(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model quantized by transformers itself, which can only do it while it loads.

    Raises:
        UserError: a row of a matrix is no multiple of the block: bitsandbytes 0.50.2 restores such a
            matrix wrongly on a CPU, without an error.
    """
    from transformers import AutoModelForCausalLM

    from distill.models.quantized import quantization_config, quantized_layers

    config = quantization_config(kind, model.dtype)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantized = AutoModelForCausalLM.from_pretrained(
            Path(folder), quantization_config=config, dtype=model.dtype, local_files_only=True
        )
    for name in quantized_layers(quantized):
        shape = tuple(original_matrix(model, name).shape)
        if kind == "nf4" and shape[1] % BLOCK:
            raise UserError(
                f"bitsandbytes: layer {name} of shape {shape}",
                f"{shape[1]} inputs are no multiple of {BLOCK}",
                f"give the model dimensions that are multiples of {BLOCK}, or take another format",
            )
    return quantized.eval()


def original_matrix(model: nn.Module, name: str) -> Tensor:
    """[O, I]: the matrix that was quantized. GPT-2's Conv1D holds [I, O], which transformers transposes."""
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(name)
    weight = module.get_parameter("weight")
    return weight.T if isinstance(module, Conv1D) else weight
