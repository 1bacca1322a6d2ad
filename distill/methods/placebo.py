"""A method that does nothing: the gate must never pass it."""

from transformers import PreTrainedModel

from distill.method import Card, Method, TeacherOutput, plain_output, plain_texts
from eval.core.documents import Batch, Row
from eval.core.sections import Generation


class Placebo(Method):
    card = Card(
        title="Placebo",
        paper="none: the control treatment of a clinical trial",
        claim="no gain at all; the gate must never pass it",
        touches="nothing",
        limits="only for tests of the gate",
    )
    only_prompt = True

    def output(self, teacher: PreTrainedModel, batch: Batch) -> TeacherOutput:
        return plain_output(teacher, batch=batch)

    def write(
        self, teacher: PreTrainedModel, prompts: list[Row], generation: Generation, seed: int
    ) -> list[list[int]]:
        return plain_texts(teacher, prompts, generation, seed)
