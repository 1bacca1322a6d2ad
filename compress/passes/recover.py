"""Recovery: distils the uncompressed student into what the passes before have left of it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.model_size import size_of
from compress.recipe import Context, Pass, PassReport, Stage
from eval.core.artifacts import digest, stage_code
from eval.core.config import Frozen
from eval.core.documents import Batch
from eval.core.sections import Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.losses.teacher_output import Target


class Recover(Pass):
    stage = Stage.RECOVERY

    class Options(Frozen):
        train: Train

    @cached_property
    def code(self) -> dict[str, str]:
        """As of any pass, with the code that trains students: it trains here too."""
        return {**super().code, **stage_code("student")}

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        from distill.trainer.loop import train

        before = size_of(model, context.dtype)
        zeros = zero_masks(model)
        curve = train(
            model,
            context.rows,
            self.options.train,
            pad=context.pad,
            seed=context.seed,
            teacher=lambda batch: parent_target(context.parent, batch),
            scratch=context.scratch / f"recover-{digest(self.identity)[:16]}",
            report=lambda step: context.report(step.number / step.total),
            after_step=lambda: restore_zeros(zeros),
        )
        model.to("cpu")
        context.parent.to("cpu")
        facts = {"loss_curve": [[step, loss] for step, loss in curve]}
        return model, PassReport(
            name=self.name, before=before, after=size_of(model, context.dtype), facts=facts
        )


@torch.no_grad()
def parent_target(parent: PreTrainedModel, batch: Batch) -> Target:
    """The prediction of the uncompressed student for the valid tokens, on the device of the batch."""
    from distill.method import plain_output

    parent.to(batch.input_ids.device)
    return plain_output(parent, batch=batch).select(torch.nn.functional.pad(batch.mask, (0, 1)))


def zero_masks(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The matrices of linear layers that hold zeros, each with its mask: True where it is zero."""
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    masks = [(weight, weight.detach() == 0) for weight in weights.values()]
    return [(weight, mask) for weight, mask in masks if bool(mask.any())]


@torch.no_grad()
def restore_zeros(zeros: list[tuple[Tensor, Tensor]]) -> None:
    """Sets pruned weights to zero again: momentum would change them."""
    for weight, mask in zeros:
        weight.masked_fill_(mask.to(weight.device), 0.0)
