"""On-policy rows: at a share of the steps a student learns from what it writes itself."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from transformers import PreTrainedModel

from distill.models.generation import generate_texts, generated_row, groups_by_length, make_prompts, uniforms
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections import Generation

AT_ONCE = 2**14  # tokens whose keys and values a student that writes holds; of logits it needs the last alone


@dataclass(frozen=True)
class OnPolicy:
    """A share of the steps learns from what the student writes (Agarwal et al. 2024, arXiv:2306.13649)."""

    share: float
    generation: Generation
    context: int
    seed: int
    pad: int

    def turn(self, step: int) -> bool:
        """Whether the student writes the rows of this step: told by the seed and the step alone."""
        return bool(uniforms(f"on-policy {self.seed} {step}", 1)[0] < self.share)

    def __call__(self, acc: Accelerator, student: PreTrainedModel, step: int, rows: list[Row]) -> list[Row]:
        """The rows that a step learns from: each process writes its share, and all of them know all texts.

        Raises:
            UserError: no process has the whole student.
        """
        if not self.turn(step):
            return rows
        if acc.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            fix = "run on_policy with plain data parallelism, or take another targets.source"
            raise UserError("targets.source", "on_policy, and no process has the whole student", fix)
        prompts = make_prompts(rows, self.generation)
        mine = prompts[acc.process_index :: acc.num_processes]
        texts: dict[str, list[int]] = {}
        for group, settings in groups_by_length(mine, self.generation, self.context, AT_ONCE):
            found = generate_texts(student, group, settings, f"{self.seed} {step}", self.pad)
            texts |= {row.id: tokens for row, tokens in zip(group, found, strict=True)}
        if acc.num_processes > 1:
            texts = {name: tokens for part in gather_object([texts]) for name, tokens in part.items()}
        return [generated_row(row, texts[row.id]) for row in prompts]
