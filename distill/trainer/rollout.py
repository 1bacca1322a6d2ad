"""On-policy rows: at a share of the steps the student learns from texts that it generates itself."""

from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from distill.models.generation import generate_texts, generated_row, groups_by_length, make_prompts, uniforms
from distill.trainer.distributed import is_sharded
from eval.core.documents import Row
from eval.core.errors import UserError
from eval.core.sections import Generation

MAX_TOKENS = 2**14  # per batch of generation, bounded by keys and values: only the last logits are needed


@dataclass(frozen=True)
class OnPolicy:
    """At a share of the steps the student generates the rows (Agarwal et al. 2024, arXiv:2306.13649)."""

    share: float
    generation: Generation
    context: int
    seed: int
    pad: int
    samples: int = 1  # texts after every prompt, each with random numbers of its own

    def generates(self, step: int) -> bool:
        """True if the student generates the rows of this step: decided by seed and step alone."""
        return bool(uniforms(f"on-policy {self.seed} {step}", 1)[0] < self.share)

    def __call__(self, acc: Accelerator, student: PreTrainedModel, step: int, rows: list[Row]) -> list[Row]:
        """The rows to learn from at a step: each process generates its share, then all exchange them.

        A step that the student writes has `samples` rows for each of `rows`, next to each other.

        Raises:
            UserError: the student is sharded.
        """
        if not self.generates(step):
            return rows
        if is_sharded(acc):
            fix = "run on_policy with plain data parallelism, or choose another targets.source"
            raise UserError("targets.source", "on_policy needs a whole student, this one is sharded", fix)
        prompts = make_prompts(rows, self.generation)
        own_prompts = prompts[acc.process_index :: acc.num_processes]
        texts: dict[tuple[str, int], list[int]] = {}
        for group, settings in groups_by_length(own_prompts, self.generation, self.context, MAX_TOKENS):
            for sample in range(self.samples):
                key = f"{self.seed} {step} {sample}" if sample else f"{self.seed} {step}"
                generated = generate_texts(student, group, settings, key, self.pad)
                texts |= {(row.id, sample): tokens for row, tokens in zip(group, generated, strict=True)}
        if acc.num_processes > 1:
            texts = {name: tokens for part in gather_object([texts]) for name, tokens in part.items()}
        return [generated_row(row, texts[row.id, i]) for row in prompts for i in range(self.samples)]
