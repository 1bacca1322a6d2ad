"""What passes measure on training rows: the loss, the norms of inputs, the model's own answers."""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from eval.documents import Batch, Row, batches, collate
from eval.errors import UserError


def calibration_rows(rows: list[Row], count: int, seed: int) -> list[Row]:
    """At most `count` of the rows, chosen by `seed` alone."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


@torch.no_grad()
def log_probs(model: Any, batch: Batch) -> Tensor:
    """[B, T, V] float32 log-probabilities of a model with the interface of transformers, on the CPU."""
    moved = batch.to(model.device)
    output = model(**moved.inputs)
    return torch.log_softmax(output.logits.float(), dim=-1).cpu()


@torch.no_grad()
def mean_loss(model: nn.Module, rows: list[Row], pad: int) -> float:
    """Mean cross-entropy per token, in nats.

    Raises:
        UserError: it is not finite.
    """
    total, tokens = 0.0, 0
    for batch in batches(rows, pad):
        logits = model(**batch.inputs, use_cache=False).logits
        total += float(
            cross_entropy(logits[:, :-1][batch.mask].float(), batch.labels[batch.mask], reduction="sum")
        )
        tokens += int(batch.mask.sum())
    if not math.isfinite(loss := total / tokens):
        raise UserError("calibration loss", loss, "the student is broken: look at its training")
    return loss


@torch.no_grad()
def input_norms(
    model: nn.Module, modules: Mapping[str, nn.Linear], rows: list[Row], pad: int
) -> dict[str, Tensor]:
    """L2 norm over all tokens of each input of `modules`: name -> [I] float32. Padding is left out.

    Raises:
        UserError: a norm is not finite, or a module saw no token.
    """
    squares = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in modules.items()}
    with _watched(modules, squares) as mask:
        for batch in batches(rows, pad):
            mask.append(batch.attention_mask.bool())
            model(**batch.inputs, use_cache=False)
    norms = {name: total.sqrt().float() for name, total in squares.items()}
    for name, norm in norms.items():
        if not bool(torch.isfinite(norm).all()) or not bool(norm.any()):
            raise UserError(f"inputs of {name}", "not finite, or all zero", "look at the student's training")
    return norms


@contextmanager
def _watched(modules: Mapping[str, nn.Linear], squares: dict[str, Tensor]) -> Iterator[list[Tensor]]:
    """Adds up squared inputs [B, T, I] where the last mask given is True."""
    masks: list[Tensor] = []

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values, mask = args[0], masks[-1]
        mask = mask.flatten() if values.ndim == 2 else mask  # some families put all tokens in one row
        if values.shape[:-1] != mask.shape:
            found = f"{tuple(values.shape)}, of {mask.numel()} tokens"
            raise UserError(f"inputs of {name}", found, "prune a model whose linear layers see every token")
        squares[name] += values[mask].double().square().sum(dim=0)

    handles = [m.register_forward_pre_hook(partial(add, name)) for name, m in modules.items()]
    try:
        yield masks
    finally:
        for handle in handles:
            handle.remove()


def check_batch(rows: list[Row], pad: int) -> Batch:
    """The fixed batch of training rows on which a model and its saved copy are compared; none is packed."""
    return collate([replace(row, tokens=row.tokens[: row.parts[0][0]], packed=()) for row in rows[:4]], pad)
