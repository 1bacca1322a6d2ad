"""A method that does nothing: the gate must never pass it."""

from transformers import PreTrainedModel

from distill.method import Card, Method, TeacherOutput, plain_output
from eval.core.documents import Batch


class Placebo(Method):
    card = Card(
        title="Placebo",
        paper="none: the control treatment of a clinical trial",
        claim="no gain at all; the gate must never pass it",
        touches="nothing",
        limits="only for tests of the gate",
    )

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return plain_output(teacher, batch=batch)
