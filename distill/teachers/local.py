"""A teacher that runs on this machine, with its method attached."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distill.losses.teacher_output import Target
from distill.method import Method, check_output
from distill.models.lm_head import capture_layers
from distill.models.quantized import load_quantized
from distill.trainer.distributed import shard_teacher
from eval.core.documents import Batch, Row
from eval.core.errors import UserError
from eval.core.sections import Generation, Targets
from eval.engines.torch import load_model


@dataclass(frozen=True)
class LocalTeacher:
    """A teacher that runs, with its method attached; no gradient is kept."""

    method: Method
    name: str
    model: PreTrainedModel
    vocabulary: int
    layers: tuple[int, ...] = ()  # whose hidden states the student matches

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """[B, T, V] log-probabilities, checked."""
        batch = batch.to(self.model.device)
        output = check_output(self.method.output(self.model, batch), batch, self.vocabulary, self.name)
        target = output.select(torch.ones_like(batch.input_ids, dtype=torch.bool))
        return target.log_softmax(0, batch.input_ids.numel()).view(*batch.input_ids.shape, -1)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target:
        """The target of the valid tokens of a batch, with hidden states where the loss matches some.

        Raises:
            UserError: hidden states are to be matched, and the teacher consists of several models.
        """
        batch = batch.to(self.model.device)
        with capture_layers(self.model, self.layers) as captured:
            output = check_output(self.method.output(self.model, batch), batch, self.vocabulary, self.name)
        if self.layers and len(output.heads) > 1:
            problem = f"needs a teacher of one model, this one has {len(output.heads)}"
            raise UserError("train.loss.hidden", problem, "use another method, or leave hidden out")
        mask = F.pad(batch.mask, (0, 1))
        return replace(output.select(mask), layers=tuple(states[mask] for states in captured))

    @torch.no_grad()
    def write(self, prompts: list[Row], generation: Generation, seed: int) -> list[list[int]]:
        """The ids that the teacher generates after each prompt, checked.

        Raises:
            UserError: the method returned too many or too few ids, or ids outside the vocabulary.
        """
        texts = self.method.write(self.model, prompts, generation, seed)
        fix = f"return for each prompt 1 to {generation.new_tokens} ids from `write`"
        if len(texts) != len(prompts):
            raise UserError(
                f"method {self.name!r}",
                f"`write` returned {len(texts)} texts for {len(prompts)} prompts",
                fix,
            )
        for row, tokens in zip(prompts, texts, strict=True):
            known = all(0 <= token < self.vocabulary for token in tokens)
            if not (known and 0 < len(tokens) <= generation.new_tokens):
                raise UserError(f"method {self.name!r}", f"`write` returned {tokens} after row {row.id}", fix)
        return texts


def load_teacher_model(
    folder: Path, targets: Targets, device: torch.device, sharded: bool = False
) -> PreTrainedModel:
    """A model of a teacher in the dtype or quantization of `targets`, without gradients.

    Args:
        sharded: over all processes, which must then call it equally often.

    Raises:
        UserError: quantization without CUDA, without bitsandbytes or of a sharded teacher.
    """
    dtype = getattr(torch, targets.dtype)
    if targets.quantization is None:
        model = load_model(folder, dtype=dtype, device=str(device)).requires_grad_(False)
        return shard_teacher(model) if sharded else model
    if sharded:
        fix = "leave it out, or use plain data parallelism"
        raise UserError("targets.quantization", "a quantized teacher cannot be sharded", fix)
    if device.type != "cuda":
        problem = f"{targets.quantization} needs CUDA, the device is {device.type}"
        raise UserError("targets.quantization", problem, "leave it out on a CPU")
    return load_quantized(folder, targets.quantization, dtype, device).requires_grad_(False)
