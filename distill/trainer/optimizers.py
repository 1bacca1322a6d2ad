"""Optimizers and their learning rates: which weights go to which, and the factor of each step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from distill.models.lm_head import last_module
from distill.trainer.muon import Muon
from eval.core.errors import require_installed
from eval.core.sections import Train

# How families call a module that weights experts, or the one that all tokens share.
ROUTERS = {"router", "gate", "router_gate", "shared_expert_gate"}


class Weights(NamedTuple):
    """The weights to train, by what they are."""

    matrices: list[nn.Parameter]  # inside the layers; LoRA's A and B; all experts of a layer in one tensor
    others: list[nn.Parameter]  # embeddings, head, routers, convolutions, tables
    vectors: list[nn.Parameter]  # norms and biases: they do not decay


def build_optimizers(
    model: PreTrainedModel, config: Train, projectors: Sequence[nn.Parameter] = ()
) -> list[Optimizer]:
    """Muon, or AdamW with a state of 8 bits, for the matrices inside the layers at `lr`, AdamW for the rest.

    The rest learns at `lr_rest`: embeddings, head, routers, projectors, norms and biases. With `adamw` all is
    AdamW's. Experts that stand in one tensor are matrices too: Muon takes each for itself, and multiplies in
    the precision of the training.
    """
    settings, weights = config.optimizer, split_weights(model)
    rest_lr, decay = settings.lr_rest or settings.lr, settings.weight_decay
    optimizers: list[Optimizer] = []
    how: dict[str, Any] = {"lr": settings.lr, "weight_decay": decay}
    if settings.name == "muon" and weights.matrices:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        optimizers.append(Muon(weights.matrices, momentum=settings.momentum, dtype=dtype, **how))
    if settings.name == "adamw_8bit" and weights.matrices:
        from bitsandbytes.optim import AdamW8bit

        optimizers.append(AdamW8bit(weights.matrices, betas=settings.betas, **how))
    inside = weights.matrices if settings.name == "adamw" else []
    groups = [
        {"params": [*weights.others, *projectors], "lr": rest_lr, "weight_decay": decay},
        {"params": weights.vectors, "lr": rest_lr, "weight_decay": 0.0},
        {"params": inside, "lr": settings.lr, "weight_decay": decay},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(AdamW(groups, lr=rest_lr, betas=settings.betas, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def check_bitsandbytes(where: str = "train") -> None:
    """Refuses an optimizer of 8 bits where its library is missing."""
    fix = "run `pip install '.[gpu]'`, or take adamw"
    require_installed("bitsandbytes", f"{where}.optimizer.name: adamw_8bit", fix)


def split_weights(model: PreTrainedModel) -> Weights:
    """The weights to train, by the module that holds each: see `Weights`."""
    ends = [model.get_input_embeddings(), last_module(model)]
    ends += [module for module in model.modules() if isinstance(module, nn.Embedding)]  # positions too
    apart = ends + [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    shared = {id(p) for module in apart if module is not None for p in module.parameters()}
    weights = Weights([], [], [])
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        # Under a parametrization a weight is `parametrizations.weight.original` of its module.
        path = name.removesuffix(".original").replace(".parametrizations.", ".").split(".")
        if weight.ndim < 2 or path[-1].endswith("bias"):  # that of every expert is a row
            weights.vectors.append(weight)
        elif id(weight) in shared or "embed" in name or (ROUTERS.intersection(path) and ".lora_" not in name):
            weights.others.append(weight)
        else:  # the decay rates of a state space are a table, called otherwise
            is_matrix = weight.ndim == 3 or (weight.ndim == 2 and path[-1] == "weight")
            (weights.matrices if is_matrix else weights.others).append(weight)
    return weights


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
