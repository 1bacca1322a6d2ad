"""The last step of a language model: hidden states to logits, with the scale and soft cap of its family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from eval.core.documents import Batch
from eval.core.errors import UserError

# Fields of a text config -> the factor on the logits: Cohere, Granite, Falcon-H1.
SCALES = {
    "logit_scale": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
    "lm_head_multiplier": lambda value: value,
}
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def is_narrow(tensor: Tensor) -> bool:
    """Whether products with a tensor are made in half precision: on a GPU, where it has that."""
    return tensor.is_cuda and tensor.dtype != torch.float32


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (hidden W^T + b) / cap), float32; no cap: scale * (hidden W^T + b).

    On a GPU the product is made in the dtype of the hidden states, on a CPU in float32; it is accumulated and
    left in float32 either way: logits rounded to bf16 would cost 4 to 23 % of the gradient.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 logits of hidden states [n, D]."""
        logits = self.product(hidden)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def product(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 hidden W^T + b of hidden states [n, D]."""
        if is_narrow(hidden):
            found = torch.mm(hidden, self.weight.to(hidden.dtype).mT, out_dtype=torch.float32)
            return found if self.bias is None else found + self.bias
        return F.linear(hidden.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def shape_(self, product: Tensor) -> Tensor | None:
        """Makes logits of a product [n, V], in place; gives their slope [n, V], None where it is `scale`."""
        if self.scale != 1:
            product *= self.scale
        if self.cap is None:
            return None
        shape = product.div_(self.cap).tanh_()
        slope = shape.square().neg_().add_(1).mul_(self.scale)
        shape *= self.cap
        return slope

    def first(self, vocabulary: int) -> "Head":
        """The same head for the first ids alone."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)

    def ready(self, dtype: torch.dtype) -> "Head":
        """The same head, its weights detached and once for all in the dtype of the products with `dtype`."""
        wanted = dtype if self.weight.is_cuda else torch.float32
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(self, weight=self.weight.detach().to(wanted), bias=bias)


def output_embedding(model: PreTrainedModel) -> nn.Linear:
    """The module that makes logits of hidden states.

    Raises:
        UserError: it is no plain linear layer.
    """
    found = model.get_output_embeddings()
    if not isinstance(found, nn.Linear) or not found.weight.is_floating_point():
        kind = f"its output embedding is {type(found).__name__}"
        raise UserError(f"model type {model.config.model_type!r}", kind, "only a plain linear one is known")
    return found


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model as its config tells it; `check_head` holds it against the model."""
    end, fields = output_embedding(model), vars(model.config.get_text_config())
    scale = 1.0
    for name, factor in SCALES.items():
        if fields.get(name) is not None:
            scale *= factor(fields[name])
    cap = next((fields[name] for name in CAPS if fields.get(name) is not None), None)
    return Head(end.weight, end.bias, scale, cap)


@contextmanager
def capture_input(end: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the output embedding hands its input on in place of logits, and leaves it in the list.

    So the last hidden state is had from the forward pass of a whole model, wrapped or not, whatever its
    family does before its head, and no [B, T, V] is made.
    """
    seen: list[Tensor] = []

    def hand_on(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    assert "forward" not in vars(end), "a tap is in place already"
    end.forward = hand_on
    try:
        yield seen
    finally:
        del end.forward


@contextmanager
def capture_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Inside, every forward pass of the model leaves the hidden states of `layers` in the list: 0 is the
    embedding, and the last one, as transformers gives it, has been through the final norm.

    Raises:
        UserError: the model has no such layer.
    """
    seen: list[Tensor] = []
    if not layers:
        yield seen
        return
    inner = model.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        output = inner(*inputs, **{**named, "output_hidden_states": True})
        check_layers(layers, len(output.hidden_states), "teacher")
        seen[:] = [output.hidden_states[layer] for layer in layers]
        return output

    assert "forward" not in vars(model), "it is watched already"
    model.forward = forward
    try:
        yield seen
    finally:
        del model.forward


def check_layers(layers: Sequence[int], states: int, whose: str) -> None:
    """Refuses a layer that a model with so many hidden states does not have."""
    if wrong := [layer for layer in layers if not 0 <= layer < states]:
        fix = f"the {whose} has layers 0 (the embedding) to {states - 1}"
        raise UserError("train.loss.hidden.pairs", f"layer {wrong[0]}", fix)


@torch.no_grad()
def check_head(model: PreTrainedModel, batch: Batch) -> None:
    """Holds head(hidden) against the model's own logits.

    Raises:
        UserError: they differ, so that the family has a last step of another kind.
    """
    training, batch = model.training, batch.to(model.device)
    model.eval()
    own = model(**batch.inputs, use_cache=False).logits[:, :-1][batch.mask]
    with capture_input(output_embedding(model)) as seen:
        model(**batch.inputs, use_cache=False)
    model.train(training)
    found = head_of(model)(seen[0][:, :-1][batch.mask])
    if not bool(own.isfinite().all()):
        return  # the first step says so, and names its rows
    unit = max(float(torch.finfo(own.dtype).eps), 1e-5)
    if not torch.allclose(found, own.float(), rtol=4 * unit, atol=4 * unit * float(own.abs().max())):
        off = float((found - own).abs().max())
        raise UserError(
            f"model type {model.config.model_type!r}",
            f"its logits are off by {off:.3g} from those of its head",
            "its last step is of a kind that is not known: see distill/models/lm_head.py",
        )
