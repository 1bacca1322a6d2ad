"""The student while it learns: its loss on a batch, and projectors that its export leaves behind."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill.losses.chunked import chunked_loss
from distill.losses.teacher_output import Dense, States, Target
from distill.models.lm_head import capture_input, check_layers, head_of, output_embedding
from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.core.sections import Hidden, Train


class DistillationModule(nn.Module):
    """What is wrapped for several processes: its forward gives the loss, so that the head's weights are whole
    there under FSDP and ZeRO-3 as well.

    Args:
        widths: of the teacher's layers that `loss.hidden` pairs, in its order.
    """

    def __init__(self, model: PreTrainedModel, config: Train, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self.model, self.settings = model, config
        self.config = model.config  # accelerate reads it for DeepSpeed
        self._no_split_modules = model._no_split_modules  # and this for FSDP
        self.end = [output_embedding(model)]  # in a list: it is a part of the model, not of this module
        self.run: Any = torch.compile(model.forward) if config.compile else model.forward
        own = model.config.get_text_config().hidden_size
        self.projectors = nn.ModuleList(
            nn.Linear(own, width, bias=False) if width != own else nn.Identity() for width in widths
        )

    def forward(self, batch: Batch, target: Target | None) -> Tensor:
        """Summed loss of a batch: position p of student and teacher answers for token p + 1."""
        pairs = self.settings.loss.hidden if target is not None else None
        narrow = self.settings.precision == "bf16"
        inputs = {**batch.inputs, "use_cache": False, **({"output_hidden_states": True} if pairs else {})}
        device = batch.input_ids.device.type
        with capture_input(self.end[0]) as seen, torch.autocast(device, torch.bfloat16, enabled=narrow):
            output = self.run(**inputs)
        places = F.pad(batch.mask, (0, 1)).flatten().nonzero()[:, 0]
        hidden = select_positions(places, seen[0])
        if narrow and hidden.is_cuda:
            hidden = hidden.bfloat16()  # as autocast hands it to a linear layer
        labels = batch.labels[batch.mask]
        loss = chunked_loss(hidden, head_of(self.model), labels, target, self.settings.loss)
        if pairs is None:
            return loss
        return loss + pairs.weight * self.apart(output.hidden_states, places, target, pairs)

    def apart(
        self, states: Sequence[Tensor], places: Tensor, target: Target | None, config: Hidden
    ) -> Tensor:
        """Summed distance of the paired layers' states at the valid tokens, in float32."""
        assert isinstance(target, Dense | States)
        check_layers([own for own, _ in config.pairs], len(states), "student")
        found = [
            state_distance(
                project(select_positions(places, states[own]).float()), layer.float(), config.distance
            )
            for (own, _), project, layer in zip(config.pairs, self.projectors, target.layers, strict=True)
        ]
        return torch.stack(found).sum()


def select_positions(places: Tensor, states: Tensor) -> Tensor:
    """[N, D] states [B, T, D] at places [N] of B * T; its gradient is five times as fast as a mask's."""
    return states.flatten(0, 1).index_select(0, places)


def state_distance(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """Sum over tokens of the distance of states [N, D]: mean square over D, or 1 - cosine."""
    if kind == "mse":
        return (student - teacher).square().mean(-1).sum()
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()


def layer_widths(target: Target | None, config: Train) -> list[int]:
    """Widths of the teacher's layers that are to be matched.

    Raises:
        UserError: the targets hold no layers.
    """
    if config.loss.hidden is None or target is None:
        return []
    if not isinstance(target, Dense | States) or len(target.layers) != len(config.loss.hidden.pairs):
        raise UserError("train.loss.hidden", "targets without hidden states", "set targets.source: online")
    return [layer.shape[1] for layer in target.layers]
