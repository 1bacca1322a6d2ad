"""The method is size: a larger pretrained model teaches, and the student's own base is its control."""

from distill.method import Card, Method, Plain, PlainBase
from eval.core.config import Frozen


class LargerTeacher(Plain):
    classifies = True
    card = Card(
        title="Larger teacher",
        paper="Hinton, Vinyals and Dean 2015, arXiv:1503.02531; of language models: Sanh et al. 2019, "
        "arXiv:1910.01108",
        claim="a larger pretrained model knows more than the base; its student takes over a part of that",
        touches="the teacher: `teacher.path` of the study in place of the base",
        limits="the control teacher is the student's own base: the gain is that of size, with all that comes "
        "with it (more text, other text, instruction tuning)",
    )

    def control(self) -> Method:
        return PlainBase(Frozen())
