"""A method that does harm: the gate must fail it."""

import math

import torch
from pydantic import Field
from transformers import PreTrainedModel

from distill.method import Card, Method, TeacherOutput
from eval.core.config import Frozen
from eval.core.documents import Batch


class Harmful(Method):
    card = Card(
        title="Uniform noise",
        paper="none: the gate must be able to fail a method, not only to find no gain",
        claim="harm: every distribution is mixed with a uniform one; the gate must fail it",
        touches="the output: p becomes (1 - share) p + share / V",
        limits="only for tests of the gate",
    )

    class Settings(Frozen):
        share: float = Field(0.2, gt=0, lt=1, description="of the uniform distribution in the mixture")

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        plain = self.model_output(teacher, batch).dense()
        share = self.settings.share
        noise = torch.full((), math.log(share / plain.shape[-1]), device=plain.device)
        return TeacherOutput(torch.logaddexp(plain + math.log1p(-share), noise))
