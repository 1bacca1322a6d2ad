"""A method that does nothing: whoever passes it fools himself."""

from transformers import PreTrainedModel

from distill.method import Card, Method, TeacherOutput, plain_output
from eval.core.documents import Batch


class Placebo(Method):
    card = Card(
        title="Placebo",
        paper="none: the control treatment of a clinical trial",
        claim="no gain at all; the gate must never pass it",
        touches="nothing",
        limits="for the honesty of the gate alone",
    )

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return plain_output(teacher, batch=batch)
