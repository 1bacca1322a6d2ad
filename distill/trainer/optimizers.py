"""Optimizers and their learning rates: which weights go to which, and the factor of each step."""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from distill.trainer.muon import Muon
from eval.core.sections import Train

# How families call the number of their experts: a router has a row for each.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def build_optimizers(
    model: PreTrainedModel, config: Train, projectors: Sequence[nn.Parameter] = ()
) -> list[Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest, or AdamW for all; no decay on vectors.

    Hidden matrices, at `lr`, are those inside the layers, LoRA's A and B among them, and experts that stand
    in one tensor of three axes; Muon multiplies them in the precision of the training. The rest, at
    `lr_rest`, are embeddings, head, routers (a row per expert), gates of one row, projectors, norms, biases.
    """
    settings = config.optimizer
    rest_lr = settings.lr_rest or settings.lr
    hidden, others = split_weights(model)
    decay = settings.weight_decay
    optimizers: list[Optimizer] = []
    if settings.name == "muon" and hidden:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        optimizers.append(Muon(hidden, settings.lr, settings.momentum, decay, dtype))
        hidden = []  # the rates of the two are of different size
    groups = [
        {"params": [*(p for p in others if p.ndim > 1), *projectors], "lr": rest_lr, "weight_decay": decay},
        {"params": [p for p in others if p.ndim < 2], "lr": rest_lr, "weight_decay": 0.0},
        {"params": hidden, "lr": settings.lr, "weight_decay": decay},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(AdamW(groups, lr=rest_lr, betas=settings.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def split_weights(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights to train: hidden matrices, and the rest; see `build_optimizers`."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends += [module for module in model.modules() if isinstance(module, nn.Embedding)]  # positions too
    shared = {id(p) for end in ends if end is not None for p in end.parameters()}
    text_config = model.config.get_text_config()
    experts = {count for name in EXPERT_COUNTS if (count := getattr(text_config, name, None))}
    hidden, others = list[nn.Parameter](), list[nn.Parameter]()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            is_router = weight.ndim == 2 and weight.shape[0] in {1, *experts} and ".lora_" not in name
            is_hidden = weight.ndim in (2, 3) and id(weight) not in shared and "embed" not in name
            (hidden if is_hidden and not is_router else others).append(weight)
    return hidden, others


def learning_rate_factor(step: int, steps: int, config: Train) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then as `schedule` says.

    `wsd`: flat, then linear to zero (Hägele et al. 2024, arXiv:2405.18392); `cosine`: half a wave to zero
    (Loshchilov and Hutter 2017, arXiv:1608.03983).
    """
    warmup = config.warmup * steps
    up = (step + 1) / max(1.0, warmup)
    if config.schedule == "cosine":
        share = max(0.0, step - warmup) / max(1.0, steps - warmup)
        return min(1.0, up) * (1 + math.cos(math.pi * share)) / 2
    down = (steps - step) / max(1.0, config.decay * steps)
    return min(1.0, up, down)


def set_learning_rate(optimizers: Sequence[Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
