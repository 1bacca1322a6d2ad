"""The student in training: its loss on a batch, and projectors of hidden states, which are not exported."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.losses.chunked import chunked_loss
from distill.losses.cross_tokenizer import cross_tokenizer_loss
from distill.losses.teacher_output import Aligned, Dense, States, Target
from distill.models.lm_head import capture_input, check_layers, head_of, output_embedding
from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.core.sections import Hidden, Train


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Inside, CUDA multiplies float32 matrices in TF32 (10 bits after the point) if `precision` says so."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


class DistillationModule(nn.Module):
    """The module that accelerate wraps: its forward returns the loss.

    So the weights of the head are whole inside it under FSDP and ZeRO-3 as well.

    Args:
        widths: of the teacher layers in `loss.hidden.pairs`, in that order.
    """

    def __init__(self, model: PreTrainedModel, config: Train, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.settings = model, config
        self.config = model.config  # read by accelerate for DeepSpeed
        self._no_split_modules = model._no_split_modules  # read by accelerate for FSDP
        self.output_embedding = [output_embedding(model)]  # in a list: a module here would count twice
        self.run_model: Any = torch.compile(model.forward) if config.compile else model.forward
        own_width = model.config.get_text_config().hidden_size
        self.projectors = nn.ModuleList(
            nn.Linear(own_width, width, bias=False) if width != own_width else nn.Identity()
            for width in widths
        )

    def forward(self, batch: Batch, target: Target | Aligned | None) -> Tensor:
        """Summed loss of a batch; position p of student and teacher predicts token p + 1."""
        with float32_products(self.settings.precision):
            return self._loss(batch, target)

    def _loss(self, batch: Batch, target: Target | Aligned | None) -> Tensor:
        pairs = self.settings.loss.hidden if target is not None else None
        half = self.settings.precision == "bf16"
        inputs = {**batch.inputs, "use_cache": False, **({"output_hidden_states": True} if pairs else {})}
        device = batch.input_ids.device.type
        with (
            capture_input(self.output_embedding[0]) as captured,
            torch.autocast(device, torch.bfloat16, enabled=half),
        ):
            output = self.run_model(**inputs)
        positions = F.pad(batch.mask, (0, 1)).flatten().nonzero()[:, 0]
        hidden = select_positions(captured[0], positions)
        if half:
            hidden = hidden.bfloat16()  # as autocast does before a linear layer
        labels = batch.labels[batch.mask]
        if isinstance(target, Aligned):
            return cross_tokenizer_loss(hidden, head_of(self.model), labels, target, self.settings.loss)
        loss = chunked_loss(hidden, head_of(self.model), labels, target, self.settings.loss)
        if pairs is None:
            return loss
        return loss + pairs.weight * self.hidden_loss(output.hidden_states, positions, target, pairs)

    def hidden_loss(
        self, states: Sequence[Tensor], positions: Tensor, target: Target | None, config: Hidden
    ) -> Tensor:
        """Summed distance between the states of paired layers at the valid tokens, in float32."""
        assert isinstance(target, Dense | States)
        check_layers([own for own, _ in config.pairs], len(states), "student")
        distances = [
            state_distance(
                project(select_positions(states[own], positions).float()), layer.float(), config.distance
            )
            for (own, _), project, layer in zip(config.pairs, self.projectors, target.layers, strict=True)
        ]
        return torch.stack(distances).sum()


def select_positions(states: Tensor, positions: Tensor) -> Tensor:
    """[N, D] of states [B, T, D] at positions [N] of B * T.

    The gradient of `index_select` is five times as fast as that of a boolean mask.
    """
    return states.flatten(0, 1).index_select(0, positions)


def state_distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Sum over tokens of the distance of states [N, D]: mean square over D, or 1 - cosine."""
    if kind == "mse":
        return (student - teacher).square().mean(-1).sum()
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()


def layer_widths(target: Target | Aligned | None, config: Train) -> list[int]:
    """Widths of the teacher layers to match.

    Raises:
        UserError: the targets hold no layers.
    """
    if config.loss.hidden is None or target is None:
        return []
    if not isinstance(target, Dense | States) or len(target.layers) != len(config.loss.hidden.pairs):
        problem = "set, but the targets contain no hidden states"
        raise UserError("train.loss.hidden", problem, "set targets.source: online, or leave hidden out")
    return [layer.shape[1] for layer in target.layers]
