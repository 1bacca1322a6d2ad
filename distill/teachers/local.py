"""A teacher that runs on this machine, with its method attached."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from distill.losses.teacher_output import Aligned, Dense, States, Target, match_vocabulary
from distill.method import Method, TeacherOutput
from distill.models.generation import stop_ids
from distill.models.lm_head import capture_layers
from distill.models.quantized import load_quantized
from distill.teachers.alignment import Alignment
from distill.trainer.distributed import shard_teacher
from eval.core.documents import Batch, Row, collate
from eval.core.errors import UserError
from eval.core.sections import Generation, Targets
from eval.engines import at_every_position
from eval.engines.torch import classifies, load_model


@dataclass(frozen=True)
class LocalTeacher:
    """A teacher that runs, with its method attached; no gradient is kept."""

    method: Method
    name: str
    model: PreTrainedModel
    vocabulary: int  # rows of the model's head
    layers: tuple[int, ...] = ()  # whose hidden states the student matches
    tokens: int = 0  # ids of its tokenizer, which a method must answer for; 0: one for each row
    alignment: Alignment | None = None  # to rows with the teacher's tokens, where the student's are others

    @torch.no_grad()
    def target(self, batch: Batch, mask: Tensor) -> Dense | States:
        """What it says at the positions of `mask` [B, T] bool of a batch of its own tokens, checked."""
        return self._select(self._output(batch), mask)

    def _output(self, batch: Batch) -> TeacherOutput:
        tokens = self.tokens or self.vocabulary
        output = self.method.output(self.model, batch)
        if isinstance(output, TeacherOutput) and classifies(self.model.config):
            hidden = [at_every_position(states, batch.input_ids.shape[1]) for states in output.hidden]
            output = replace(output, hidden=hidden)
        return check_output(output, batch, tokens, self.name)

    def _select(self, output: TeacherOutput, mask: Tensor) -> Dense | States:
        target = match_vocabulary(output.select(mask), self.vocabulary)
        assert isinstance(target, Dense | States)
        return target

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> Tensor:
        """[B, T, V] log-probabilities of a batch of the teacher's own tokens, checked."""
        batch = batch.to(self.model.device)
        target = self.target(batch, torch.ones_like(batch.input_ids, dtype=torch.bool))
        return target.log_softmax(0, batch.input_ids.numel()).view(*batch.input_ids.shape, -1)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target | Aligned:
        """The target of the valid tokens of a student's batch, with hidden states if the loss matches some.

        Raises:
            UserError: hidden states are to be matched, and the teacher consists of several models, or its
                method runs the model over other tokens than those of the rows.
        """
        if self.alignment is not None:
            translation = self.alignment.translate(batch)
            batch = translation.batch.to(self.model.device)
            target = self.target(batch, F.pad(batch.mask, (0, 1)))
            return self.alignment.target(replace(translation, batch=batch), target)
        batch = batch.to(self.model.device)
        with capture_layers(self.model, self.layers) as captured:
            output = self._output(batch)
        if self.layers and len(output.heads) > 1:
            problem = f"needs a teacher of one model, this one has {len(output.heads)}"
            raise UserError("train.loss.hidden", problem, "use another method, or leave hidden out")
        shape = batch.input_ids.shape
        if other := [tuple(states.shape[:2]) for states in captured if states.shape[:2] != shape]:
            problem = (
                f"rows of {tuple(shape)} tokens, but method {self.name!r} runs its model over {other[0]}"
            )
            raise UserError("train.loss.hidden", problem, "set data.packing: false, or leave hidden out")
        mask = F.pad(batch.mask, (0, 1))
        return replace(self._select(output, mask), layers=tuple(states[mask] for states in captured))

    def reader(self, prompts: list[Row]) -> Callable[[list[Row]], Dense | States]:
        """What it says, checked, of the token after rows that grow from prompts of its own tokens."""
        read = self.method.reader(self.model, prompts)

        def target(rows: list[Row]) -> Dense | States:
            last = collate([replace(row, tokens=row.tokens[-1:], given=0) for row in rows], 0)
            last = last.to(self.model.device)
            output = TeacherOutput(read(rows)[:, None])
            output = check_output(output, last, self.tokens or self.vocabulary, self.name)
            return self._select(output, last.attention_mask.bool())

        return target

    @torch.no_grad()
    def write(self, prompts: list[Row], generation: Generation, seed: int) -> list[list[int]]:
        """The ids that the teacher generates after each prompt, checked; moved as text if tokenizers differ.

        Raises:
            UserError: the method returned too many or too few ids, or ids outside the vocabulary.
        """
        if self.alignment is None:
            return self._write(prompts, generation, seed)
        texts: dict[str, list[int]] = {}
        translated = sorted(map(self.alignment.prompt, prompts), key=lambda row: len(row.tokens))
        for _, group in groupby(translated, key=lambda row: len(row.tokens)):
            rows = list(group)
            for row, tokens in zip(rows, self._write(rows, generation, seed), strict=True):
                written = self.alignment.written(tokens, stop_ids(self.model))
                texts[row.id] = written[: generation.new_tokens]
        return [texts[row.id] for row in prompts]

    def _write(self, prompts: list[Row], generation: Generation, seed: int) -> list[list[int]]:
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


def check_output(output: object, batch: Batch, vocabulary: int, name: str) -> TeacherOutput:
    """Returns the output after checks of type, shape and values, for every token of the batch.

    Args:
        vocabulary: ids of the tokenizer, which the output must have; rows beyond them are padding.

    Raises:
        UserError: the method returned something else: no output, another shape, NaN, or not normalised.
    """
    thing, fix = f"method {name!r}", "return TeacherOutput(log_probs) from `output`"
    if not isinstance(output, TeacherOutput):
        raise UserError(thing, f"output returned {type(output).__name__}", fix)
    if (output.log_probs is None) != bool(output.heads) or len(output.hidden) != len(output.heads):
        problem = "the output has neither log_probs nor hidden states with one head each"
        raise UserError(thing, problem, fix)
    if output.log_probs is not None:
        return replace(output, log_probs=_check_log_probs(output.log_probs, batch, vocabulary, thing))
    for hidden, head in zip(output.hidden, output.heads, strict=True):
        shape, rows = (*batch.input_ids.shape, head.weight.shape[1]), head.weight.shape[0]
        if tuple(hidden.shape) != shape or rows < vocabulary:
            problem = f"hidden states of shape {tuple(hidden.shape)} with a head of {rows} tokens"
            raise UserError(thing, problem, f"must be {shape} = [B, T, D] and {vocabulary} tokens")
        if not bool(torch.isfinite(hidden[batch.attention_mask.bool()]).all()):
            fix = f"look at rows {', '.join(batch.ids)}"
            raise UserError(thing, "hidden states with NaN or infinity", fix)
    fewest = min(head.weight.shape[0] for head in output.heads)
    return replace(output, heads=[head.cut(fewest) for head in output.heads])  # some may be padded further


def _check_log_probs(log_probs: Tensor, batch: Batch, vocabulary: int, thing: str) -> Tensor:
    shape = (*batch.input_ids.shape, vocabulary)
    if log_probs.shape[:-1] != shape[:-1] or log_probs.shape[-1] < vocabulary:
        raise UserError(thing, f"log_probs of shape {tuple(log_probs.shape)}", f"must be {shape} = [B, T, V]")
    if not log_probs.dtype.is_floating_point:
        raise UserError(thing, f"log_probs of type {log_probs.dtype}", "return float32 log-probabilities")
    log_probs = log_probs.float()
    total = log_probs.logsumexp(dim=-1)[batch.attention_mask.bool()]
    if not bool(torch.isfinite(total).all()):
        raise UserError(thing, "log_probs with NaN or infinity", f"look at rows {', '.join(batch.ids)}")
    if bool((log_probs.amin(dim=-1) == -torch.inf)[batch.attention_mask.bool()].any()):
        fix = "mix in a little of the plain model: the KL divergence from 0 is infinite"
        raise UserError(thing, "log_probs with a probability of 0", fix)
    if float(total.abs().max()) > 1e-2:
        raise UserError(
            thing, f"log_probs sum to {float(total.max().exp()):.4g}", "normalise with log_softmax"
        )
    return log_probs


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
