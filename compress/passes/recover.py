"""Recovery: distils the uncompressed student, or the teacher of the method, into what the passes before left.

With `quantize` the matrices inside the layers are rounded in every forward pass, and are left on the levels
that they were trained on: an export that rounds to the same levels changes them no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.model_size import check_groups, layer_inputs, size_of
from compress.quantized_training import keep_rounded, put_on_grid
from compress.recipe import Context, Grid, Pass, PassReport, Stage
from compress.targets import Targets
from eval.core.artifacts import digest, stage_code
from eval.core.config import Frozen
from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.core.sections import Train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distill.losses.teacher_output import Target
    from distill.teachers.target_source import TargetSource


class Quantize(Targets):
    """Matrices inside the layers that are rounded while they are trained."""

    bits: int = Field(4, ge=2, le=8, description="of a weight")
    group_size: int = Field(64, ge=-1, description="inputs of a row that share one scale; -1: all of them")

    @model_validator(mode="after")
    def has_groups(self) -> Self:
        if self.group_size == 0:
            raise ValueError("group_size 0; give a number above 0, or -1 for whole rows")
        return self

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size)


class Recover(Pass):
    stage = Stage.RECOVERY

    class Options(Frozen):
        train: Train = Field(description="how the model is trained")
        teacher: Literal["student", "method"] = Field(
            "student", description="who teaches: the uncompressed student, or what taught that one"
        )
        quantize: Quantize | None = Field(
            None, description="matrices that are rounded while they are trained; none: none is"
        )

    @cached_property
    def code(self) -> dict[str, str]:
        """As of any pass, with the code that trains students: it trains here too."""
        return {**super().code, **stage_code("student")}

    @property
    def trained_grid(self) -> Grid | None:
        return None if self.options.quantize is None else self.options.quantize.grid

    def grid_problem(self, grid: Grid) -> str | None:
        return None if self.trained_grid == grid else "recover trains off them"

    @property
    def method_training(self) -> Train | None:
        return self.options.train if self.options.teacher == "method" else None

    def preview(self, model: PreTrainedModel) -> PreTrainedModel:
        quantize = self.options.quantize
        if quantize is not None:
            names = quantize.choose(layer_inputs(model))
            fix = "give a group size that divides all of them, or leave that matrix out by `ignore`"
            if quantize.group_size > 0:
                check_groups(model, quantize.group_size, "recover.quantize.group_size", fix, names)
        return model

    def apply(self, model: PreTrainedModel, context: Context) -> tuple[PreTrainedModel, PassReport]:
        from distill.trainer.loop import train

        before, quantize = size_of(model, context.dtype), self.options.quantize
        zeros = zero_masks(model)
        names = [] if quantize is None else sorted(quantize.choose(layer_inputs(model)))
        if quantize is not None:
            put_on_grid(model, names, quantize.grid)
        with self._source(context) as source:
            curve = train(
                model,
                source.rows,
                self.options.train,
                pad=context.pad,
                seed=context.seed,
                teacher=source.teacher,
                rewrite=source.rewrite,
                scratch=context.scratch / f"recover-{self._fingerprint(context)[:16]}",
                report=lambda step: context.report(step.number / step.total),
                after_step=lambda: restore_zeros(zeros),
            )
        keep_rounded(model, names)
        model.to("cpu")
        context.parent.to("cpu")
        facts: dict[str, Any] = {"loss_curve": [[step, loss] for step, loss in curve]}
        if quantize is not None:
            facts |= {"grid": str(quantize.grid), "matrices": len(names)}
        return model, PassReport(
            name=self.name, before=before, after=size_of(model, context.dtype), facts=facts
        )

    def _fingerprint(self, context: Context) -> str:
        """Of what decides its training: checkpoints of another one are not taken up."""
        method = context.method if self.options.teacher == "method" else None
        return digest([*self.identity, *([method.identity] if method else [])])

    @contextmanager
    def _source(self, context: Context) -> Iterator[TargetSource]:
        """What is trained on: the rows and the teacher.

        Raises:
            UserError: there is no method, or its targets are damaged.
        """
        from distill.teachers.target_source import TargetSource

        if self.options.teacher == "student":
            yield TargetSource(context.rows, lambda batch: parent_target(context.parent, batch))
            return
        if context.method is None:
            problem = "method, but these models were not taught by one"
            raise UserError("recover.teacher", problem, "take teacher: student")
        with context.method.open() as source:
            yield source


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
