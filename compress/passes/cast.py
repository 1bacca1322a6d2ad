"""The weights in bf16 or fp16 (IEEE 754 binary16): half of the bytes of float32, each rounded once.

The torch engine computes in this format as well where the machine is fast in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from compress.model_size import cast_weights, size_of
from compress.recipe import Context, Pass, PassReport, Stage
from eval.core.config import Frozen
from eval.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Cast(Pass):
    stage = Stage.PRECISION
    last = True

    class Options(Frozen):
        dtype: Literal["bfloat16", "float16"] = Field(description="what weights are stored in")

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        before = size_of(model, context.dtype)
        worst = max(_rounding(name, weight.detach(), dtype) for name, weight in model.named_parameters())
        cast = cast_weights(model, dtype)
        weights = sum(weight.numel() for weight in cast.parameters())
        reached = sum(weight.numel() for weight in cast.parameters() if weight.dtype == dtype)
        return cast, PassReport(
            name=self.name,
            before=before,
            after=size_of(cast),
            named=weights,
            reached=reached,
            facts={"dtype": self.options.dtype, "worst_rounding": worst},
        )


def _rounding(name: str, weight: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest change of a weight, by the largest one of its tensor.

    Raises:
        UserError: a weight has no finite value in `dtype`.
    """
    largest, change = float(weight.abs().max()), float((weight - weight.to(dtype)).abs().max())
    most = torch.finfo(dtype).max
    if not change < float("inf"):
        problem = f"a weight of {largest:.3g} is beyond {dtype}, whose largest is {most:.3g}"
        raise UserError(name, problem, "cast to bfloat16, or leave the recipe out")
    return change / largest if largest else 0.0
