"""K plain models trained independently; their probabilities are averaged."""

import math
from copy import deepcopy
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from distill.method import (
    Card,
    Method,
    MethodContext,
    Plain,
    Retrained,
    TeacherOutput,
    plain_output,
)
from distill.models.generation import CachedReader
from eval.core.config import Frozen
from eval.core.documents import Batch, Row
from eval.core.errors import UserError
from eval.core.sections import Train


def _same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in pairs)


@torch.no_grad()
def _average(models: list[PreTrainedModel]) -> PreTrainedModel:
    """The model of their mean weights: a uniform soup (Wortsman et al. 2022, arXiv:2203.05482)."""
    mean = deepcopy(models[0])
    for weight, *each in zip(mean.parameters(), *(model.parameters() for model in models), strict=True):
        weight.copy_(torch.stack([one.float().to(weight.device) for one in each]).mean(0))
    return mean


class Ensemble(Method):
    card = Card(
        title="Deep ensemble",
        paper="Lakshminarayanan, Pritzel and Blundell 2017, arXiv:1612.01474; distilled: Hinton et al. 2015, "
        "arXiv:1503.02531",
        claim="models of different initialisation and data order make different errors; their mean is better",
        touches="the output: K forward passes instead of one",
        limits="K times the memory and time; the gain shrinks with more data, and members of one frozen "
        "base do not differ",
    )

    classifies = True

    class Settings(Frozen):
        members: int = Field(3, gt=1, description="models, the base of the seed among them")
        control: Literal["member", "longer", "average"] = Field(
            "member",
            description="a member; one trained as long as all together; or one of the mean of their weights",
        )
        train: Train | None = Field(
            None, description="for `control: longer`: how it is trained further, once for every other member"
        )
        averaged: bool = Field(False, description="the mean of weights in place of that of probabilities")

        @model_validator(mode="after")
        def longer_is_trained(self) -> Self:
            if (self.control == "longer") != (self.train is not None):
                raise ValueError("`train` is given for `control: longer`, and for it alone")
            return self

    def control(self) -> Method:
        """One member; the same after the budget of the others; or the rival that is one model to serve."""
        settings = self.settings
        if settings.control == "average":
            return Ensemble(settings.model_copy(update={"averaged": True}))
        if settings.control == "member":
            return Plain(Frozen())
        train, others = settings.train, settings.members - 1
        steps = None if train.steps is None else others * train.steps
        train = train.model_copy(update={"epochs": others * train.epochs, "steps": steps})
        return Retrained(Retrained.Settings(train=train))

    def bases(self, seed: int, seeds: list[int]) -> list[int]:
        """`members` seeds of a ring that starts with this one; with as many members as seeds, all of them."""
        beyond = (s for s in range(max(seeds) + 1 + self.settings.members) if s not in seeds)
        ring = [*seeds, *beyond][: max(len(seeds), self.settings.members)]
        start = ring.index(seed)
        return sorted((ring * 2)[start : start + self.settings.members])

    def load_parts(self, teacher: PreTrainedModel, context: MethodContext) -> list[PreTrainedModel]:
        others = [seed for seed in self.bases(context.seed, context.seeds) if seed != context.seed]
        models = [context.load_base(seed).to(teacher.device) for seed in others]
        if _same_weights(teacher, models[0]):
            raise UserError(
                "method ensemble",
                "needs different members, found two with the same weights",
                "set `base.train`, so that each member is trained",
            )
        return [_average([teacher, *models])] if self.settings.averaged else models

    def reader(self, teacher: PreTrainedModel, prompts: list[Row]) -> CachedReader:
        return CachedReader(self.parts if self.settings.averaged else [teacher, *self.parts], prompts)

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        if self.settings.averaged:
            return self.model_output(self.parts[0], batch)
        if self.below is None:
            return plain_output(teacher, *self.parts, batch=batch)
        log_probs = torch.stack([self.model_output(model, batch).dense() for model in (teacher, *self.parts)])
        return TeacherOutput(log_probs.logsumexp(0) - math.log(len(log_probs)))
