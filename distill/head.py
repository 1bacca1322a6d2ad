"""The last step of a language model: hidden states to logits, with the scale and soft cap of its family."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * (hidden W^T + b) / cap), float32; no cap: scale * (hidden W^T + b)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0  # Cohere's logit_scale, 1 / Granite's logits_scaling
    cap: float | None = None  # Gemma's final_logit_softcapping

    def __call__(self, hidden: Tensor) -> Tensor:
        """[n, V] float32 logits of hidden states [n, D]."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
