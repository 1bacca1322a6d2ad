"""The head of a language model: hidden states to logits, with the scale and soft cap of its family."""

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
from eval.engines import at_every_position
from eval.engines.torch import classifies, logits_of

# Fields of a text config -> the factor on the logits: Cohere, Granite, Falcon-H1.
SCALES = {
    "logit_scale": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
    "lm_head_multiplier": lambda value: value,
}
ROUNDINGS = 16  # times one: bias, scale and cap round again in a model of 16 bits
TRIED, TRIED_IDS = 16, 4096  # positions and ids on which rounding is measured
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


def is_half_precision(tensor: Tensor) -> bool:
    """True if a tensor has 16 bits a number, so that products with it are computed from 16 bits."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def half_product(one: Tensor, other: Tensor) -> Tensor:
    """Product [n, m] of 16-bit matrices, summed in float32; on a CPU its result is rounded to 16 bits."""
    if one.is_cuda:
        return torch.mm(one, other, out_dtype=torch.float32)
    return torch.mm(one, other)  # torch has no product there that returns another dtype


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (hidden W^T + b) / cap), float32; no cap: scale * (hidden W^T + b).

    On a GPU the product is computed in the dtype of the weight, on a CPU in float32, and returned in float32
    either way. A CPU rounds the result of a 16-bit product, and logits rounded to bf16 change the gradient by
    2 to 23 %: only a head that is `centred`, which leaves less to round, makes it there.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    cap: float | None = None
    rounded: bool = False  # products with a 16-bit weight are of 16 bits on a CPU too

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 logits of hidden states [n, D]."""
        logits = self.widened(self.product(hidden))
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def exact(self, hidden: Tensor) -> Tensor:
        """The same in float64."""
        bias = None if self.bias is None else self.bias.double()
        logits = F.linear(hidden.double(), self.weight.double(), bias) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def product(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 hidden W^T + b of hidden states [n, D]; of a `rounded` head without b, 16 bits."""
        if self.rounded:
            return half_product(hidden.to(self.weight.dtype), self.weight.mT)
        bias = None if self.bias is None else self.bias.float()
        if is_half_precision(self.weight) and self.weight.is_cuda:
            logits = half_product(hidden.to(self.weight.dtype), self.weight.mT)
            return logits.float() if bias is None else logits + bias
        return F.linear(hidden.float(), self.weight.float(), bias)

    def widened(self, product: Tensor) -> Tensor:
        """[n, V] float32 hidden W^T + b of a `product`."""
        if not self.rounded:
            return product
        return product.float() if self.bias is None else product + self.bias.float()

    def scale_and_cap_(self, product: Tensor) -> Tensor | None:
        """Turns a product [n, V] into logits in place; returns the derivative, None if it is `scale`."""
        if self.scale != 1:
            product *= self.scale
        if self.cap is None:
            return None
        capped = product.div_(self.cap).tanh_()
        slope = capped.square().neg_().add_(1).mul_(self.scale)
        capped *= self.cap
        return slope

    def cut(self, vocabulary: int) -> "Head":
        """The head for the first `vocabulary` ids."""
        bias = None if self.bias is None else self.bias[:vocabulary]
        return replace(self, weight=self.weight[:vocabulary], bias=bias)

    def detach(self, hidden_dtype: torch.dtype) -> "Head":
        """The head with detached weights, converted once to the dtype of products with hidden states."""
        dtype = hidden_dtype if self.weight.is_cuda or self.rounded else torch.float32
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(self, weight=self.weight.detach().to(dtype), bias=bias)

    def centred(self, hidden: Tensor) -> tuple["Head", Tensor]:
        """A head and hidden states [n, D], less their mean, with the same logits but for rounding.

        The product of weight and mean, in float32, becomes a part of the bias. So a CPU has less to round:
        with SmolLM2-135M the gradient from bf16 products is 0.7 % off, and not 1.5 %.
        """
        mean = hidden.float().mean(0)
        offset = F.linear(mean, self.weight.float(), None if self.bias is None else self.bias.float())
        return replace(self, bias=offset, rounded=True), (hidden.float() - mean).to(hidden.dtype)


def last_module(model: PreTrainedModel) -> nn.Module | None:
    """What turns hidden states into logits: of a classifier the last layer with an output per class."""
    if not classifies(model.config):
        return model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return next((one for one in reversed(linear) if one.out_features == model.config.num_labels), None)


def output_embedding(model: PreTrainedModel) -> nn.Linear:
    """The same.

    Raises:
        UserError: it is not a plain linear layer.
    """
    head = last_module(model)
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        problem = f"its output embedding is {type(head).__name__}"
        fix = "use a family whose output embedding is a plain linear layer"
        raise UserError(f"model type {model.config.model_type!r}", problem, fix)
    return head


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, read from its config; `check_head` compares it with the model."""
    end, fields = output_embedding(model), vars(model.config.get_text_config())
    scale = 1.0
    for name, factor in SCALES.items():
        if fields.get(name) is not None:
            scale *= factor(fields[name])
    cap = next((fields[name] for name in CAPS if fields.get(name) is not None), None)
    return Head(end.weight, end.bias, scale, cap)


@contextmanager
def capture_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the output embedding returns its input in place of logits, and appends it to the list.

    So the last hidden state comes from the forward pass of a whole model, wrapped or not, whatever its family
    does before its head, and no [B, T, V] is made. It is [B, T, D]; [B, 1, D] of an encoder that makes one
    state of a row, and classifies that.
    """
    captured: list[Tensor] = []

    def return_input(hidden: Tensor) -> Tensor:
        captured.append(hidden[:, None] if hidden.ndim == 2 else hidden)
        return hidden

    assert "forward" not in vars(head), "its forward is replaced already"
    head.forward = return_input
    try:
        yield captured
    finally:
        del head.forward


@contextmanager
def capture_layers(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """Inside, every forward pass of the model puts the hidden states of `layers` into the list.

    Layer 0 is the embedding; the last one has passed the final norm, as in transformers.

    Raises:
        UserError: the model has no such layer.
    """
    captured: list[Tensor] = []
    if not layers:
        yield captured
        return
    own_forward = model.forward

    def forward(*inputs: Any, **named: Any) -> Any:
        output = own_forward(*inputs, **{**named, "output_hidden_states": True})
        check_layers(layers, len(output.hidden_states), "teacher")
        captured[:] = [output.hidden_states[layer] for layer in layers]
        return output

    assert "forward" not in vars(model), "its forward is replaced already"
    model.forward = forward
    try:
        yield captured
    finally:
        del model.forward


def check_layers(layers: Sequence[int], states: int, whose: str) -> None:
    """Refuses a layer number beyond the hidden states of a model."""
    if wrong := [layer for layer in layers if not 0 <= layer < states]:
        fix = f"choose layers from 0 (the embedding) to {states - 1}"
        raise UserError("train.loss.hidden.pairs", f"the {whose} has no layer {wrong[0]}", fix)


@torch.no_grad()
def check_head(model: PreTrainedModel, batch: Batch) -> None:
    """Compares head(hidden) with the logits of the model itself.

    Raises:
        UserError: they differ by more than rounding explains: the family computes its logits in another way.
    """
    training, batch = model.training, batch.to(model.device)
    model.eval()
    logits = logits_of(model, batch, use_cache=False)[:, :-1][batch.mask]
    with capture_input(output_embedding(model)) as captured:
        model(**batch.inputs, use_cache=False)
    model.train(training)
    hidden = at_every_position(captured[0], batch.input_ids.shape[1])
    if not bool(logits.isfinite().all()):
        return  # the first step reports it with the names of the rows
    head, hidden = head_of(model), hidden[:, :-1][batch.mask]
    error = float((head(hidden) - logits.float()).abs().max())
    if not error <= (allowed := ROUNDINGS * _head_noise(head, hidden, logits)):
        raise UserError(
            f"model type {model.config.model_type!r}",
            f"its logits differ by {error:.3g} from those computed with its head (rounding explains "
            f"{allowed:.3g}): this family scales or caps them in a way that is not known here",
            "use a base of another family, such as llama or qwen3",
        )


def _head_noise(head: Head, hidden: Tensor, logits: Tensor) -> float:
    """What one rounding of these logits [N, V] is, and what their product is off: against float64, at most.

    Measured at some positions, on the ids with the largest logits.
    """
    some, ids = hidden[:TRIED], logits[:TRIED].abs().amax(0).topk(min(TRIED_IDS, logits.shape[1])).indices
    cut = replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids])
    exact, coarse = cut.exact(some), max(logits.dtype, head.weight.dtype, key=lambda d: torch.finfo(d).eps)
    return max(float((cut(some) - exact).abs().max()), float((exact.to(coarse) - exact).abs().max()))
