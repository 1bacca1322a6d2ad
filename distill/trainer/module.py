"""A model in training: its loss on a batch, and projectors and further heads, which are not exported."""

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
from distill.models.layers import decoder_layers
from distill.models.lm_head import capture_input, check_layers, head_of, output_embedding
from eval.core.documents import Batch
from eval.core.errors import UserError
from eval.core.sections import Hidden, Train
from eval.engines import at_every_position


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


class FutureHead(nn.Module):
    """The state from which a later token is predicted, from the last one [n, D]: at first the same.

    A residual block, as in Medusa (Cai et al. 2024, arXiv:2401.10774).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Linear(width, width)
        nn.init.zeros_(self.block.weight)
        nn.init.zeros_(self.block.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.block(hidden))


class DistillationModule(nn.Module):
    """The module that accelerate wraps: its forward returns the loss.

    So the weights of the head are whole inside it under FSDP and ZeRO-3 as well.

    Args:
        widths: of the teacher layers in `loss.hidden.pairs`, in that order.
        norm: what `final_norm` found, where `exits` asks for it.

    Raises:
        UserError: the model has no such layer in its middle as `exits` names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: Train,
        widths: Sequence[int] = (),
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_exits(config, model.config.get_text_config().num_hidden_layers)
        self.model, self.settings = model, config
        self.config = model.config  # read by accelerate for DeepSpeed
        self._no_split_modules = model._no_split_modules  # read by accelerate for FSDP
        self.output_embedding = [output_embedding(model)]  # in a list: a module here would count twice
        self.final_norm = [norm]
        self.run_model: Any = torch.compile(model.forward) if config.compile else model.forward
        own_width = model.config.get_text_config().hidden_size
        self.projectors = nn.ModuleList(
            nn.Linear(own_width, width, bias=False) if width != own_width else nn.Identity()
            for width in widths
        )
        ahead = config.future.tokens if config.future else 0
        self.future_heads = nn.ModuleList(FutureHead(own_width) for _ in range(ahead))

    @property
    def own_weights(self) -> list[nn.Parameter]:
        """Those that are trained beside the model's, and not exported with it."""
        return [*self.projectors.parameters(), *self.future_heads.parameters()]

    def forward(self, batch: Batch, target: Target | Aligned | None) -> Tensor:
        """Summed loss of a batch; position p of student and teacher predicts token p + 1."""
        with float32_products(self.settings.precision):
            return self._loss(batch, target)

    def _loss(self, batch: Batch, target: Target | Aligned | None) -> Tensor:
        pairs = self.settings.loss.hidden if target is not None else None
        exits = self.settings.exits if self.training else None
        half = self.settings.precision == "bf16"
        inputs = {**batch.inputs, "use_cache": False}
        if pairs or exits:
            inputs["output_hidden_states"] = True
        device = batch.input_ids.device.type
        with (
            capture_input(self.output_embedding[0]) as captured,
            torch.autocast(device, torch.bfloat16, enabled=half),
        ):
            output = self.run_model(**inputs)
        positions = F.pad(batch.mask, (0, 1)).flatten().nonzero()[:, 0]
        states = at_every_position(captured[0], batch.input_ids.shape[1])
        hidden = select_positions(states, positions)
        if half:
            hidden = hidden.bfloat16()  # as autocast does before a linear layer
        labels = batch.labels[batch.mask]
        if isinstance(target, Aligned):
            loss = cross_tokenizer_loss(hidden, head_of(self.model), labels, target, self.settings.loss)
        else:
            loss = chunked_loss(hidden, head_of(self.model), labels, target, self.settings.loss)
        if self.settings.future and self.training:
            loss = loss + self.settings.future.weight * self.future_loss(states, batch)
        if exits:
            middle = [output.hidden_states[layer] for layer in exits.layers]
            loss = loss + exits.weight * self.exit_loss(middle, positions, labels)
        if pairs is None:
            return loss
        assert not isinstance(target, Aligned)
        return loss + pairs.weight * self.hidden_loss(output.hidden_states, positions, target, pairs)

    def future_loss(self, states: Tensor, batch: Batch) -> Tensor:
        """Summed cross-entropy of the tokens after the next one, over the heads: head k predicts p + 1 + k.

        Multi-token prediction (Gloeckle et al. 2024, arXiv:2404.19737), through the model's own head.

        Args:
            states: [B, T, D] last hidden states.
        """
        total = states.new_zeros((), dtype=torch.float32)
        for ahead, head in enumerate(self.future_heads, start=1):
            mask = torch.zeros_like(batch.input_ids, dtype=torch.bool)
            size = max(0, mask.shape[1] - 1 - ahead)
            mask[:, :size] = batch.mask[:, ahead:]
            if batch.positions is not None:  # of one document
                mask[:, :size] &= batch.positions[:, 1 + ahead :] == batch.positions[:, :size] + 1 + ahead
            places = mask.flatten().nonzero()[:, 0]
            hidden = head(select_positions(states, places))
            if self.settings.precision == "bf16":
                hidden = hidden.bfloat16()
            labels = batch.input_ids.flatten()[places + 1 + ahead]
            total = total + chunked_loss(hidden, head_of(self.model), labels, None, self.settings.loss)
        return total

    def exit_loss(self, states: Sequence[Tensor], positions: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of the next token from every middle layer, by the model's own norm and head.

        Deep supervision (Lee et al. 2015, arXiv:1409.5185) by the exit that all layers share in LayerSkip
        (Elhoushi et al. 2024, arXiv:2404.16710).

        Args:
            states: [B, T, D] of each layer.
            positions: [N] of B * T, at which tokens `labels` [N] are predicted.
        """
        (norm,) = self.final_norm
        assert norm is not None
        total = labels.new_zeros((), dtype=torch.float32)
        for state in states:
            hidden = norm(select_positions(state, positions))
            if self.settings.precision == "bf16":
                hidden = hidden.bfloat16()
            total = total + chunked_loss(hidden, head_of(self.model), labels, None, self.settings.loss)
        return total

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


def check_exits(config: Train, layers: int, where: str = "train") -> None:
    """Refuses exits that are no middle layers of a model with so many layers.

    Args:
        where: key of the settings in the study, for errors.
    """
    numbers = config.exits.layers if config.exits else []
    if wrong := [number for number in numbers if number >= layers]:
        fix = f"choose layers from 1 to {layers - 1}" if layers > 1 else "leave exits out"
        raise UserError(f"{where}.exits.layers", f"{wrong[0]} is no middle layer of {layers}", fix)


@torch.no_grad()
def final_norm(model: PreTrainedModel, batch: Batch) -> nn.Module:
    """The norm between the last decoder layer and the output embedding; the identity where there is none.

    Found by what a forward pass does, without a table of families.

    Raises:
        UserError: more than one module stands there.
    """
    layers = decoder_layers(model)[2]
    inside, ends, normed = set(layers.modules()), [], []

    def note_end(module: nn.Module, inputs: Any, output: Any) -> None:
        ends.append(output[0] if isinstance(output, tuple) else output)

    def note_next(module: nn.Module, inputs: Any, output: Any) -> None:
        if ends and inputs and inputs[0] is ends[0]:
            normed.append((module, output))

    others = (module for module in model.modules() if module not in inside)
    handles = [module.register_forward_hook(note_next) for module in others]
    handles.append(layers[-1].register_forward_hook(note_end))
    training, batch = model.training, batch.to(model.device)
    model.eval()
    try:
        with capture_input(output_embedding(model)) as captured:
            model(**batch.inputs, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for module, output in [(nn.Identity(), ends[0]), *normed]:
        if isinstance(output, Tensor) and torch.equal(output, captured[0]):
            return module
    problem = "more than a norm stands between its last layer and its output embedding"
    raise UserError(f"model type {model.config.model_type!r}", problem, "leave exits out")


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
