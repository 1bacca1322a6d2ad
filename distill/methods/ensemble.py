"""K plain models trained independently; their probabilities are averaged."""

import torch
from pydantic import Field
from transformers import PreTrainedModel

from distill.method import Card, Method, MethodContext, TeacherOutput, plain_output
from eval.core.config import Frozen
from eval.core.documents import Batch
from eval.core.errors import UserError


def _same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b.to(a.device)) for a, b in pairs)


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

    class Settings(Frozen):
        members: int = Field(3, gt=1)

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
        return models

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return plain_output(teacher, *self.parts, batch=batch)
