"""A format for each matrix: how much each one changes the model is measured, an integer program chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations
from transformers.pytorch_utils import Conv1D

from compress.calibration import Walk
from compress.quantized_training import put_on_grid
from compress.recipe import Context, Grid
from distill.method import plain_output
from eval.core.documents import Batch, Row, tokens_per_batch
from eval.score.divergence import kl_divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALE = 2  # bytes of a scale
POSITIONS = 1024  # predictions that are compared


def grid_bytes(grid: Grid, rows: int, inputs: int) -> float:
    """Bytes of a matrix [rows, inputs] of which each group has a scale in 16 bits."""
    groups = 1 if grid.group_size < 0 else inputs // grid.group_size
    return rows * (inputs * grid.bits / 8 + groups * SCALE)


def fits(grid: Grid, inputs: int) -> bool:
    return grid.group_size < 0 or inputs % grid.group_size == 0


def allocate(costs: np.ndarray, sizes: np.ndarray, budget: float) -> list[int]:
    """For each of M matrices the number of its format, so that the sum of costs is least within the budget.

    Costs of single changes are added up, as if none depended on another. Solved exactly by HiGHS.

    Args:
        costs: [M, F], infinite where a matrix cannot have a format.
        sizes: [M, F] bytes.
        budget: bytes of all matrices together; the smallest formats must fit into it.
    """
    matrices, formats = costs.shape
    possible = np.isfinite(costs)
    one_each = np.kron(np.eye(matrices), np.ones(formats))
    scale = max(float(costs[possible].max(initial=0.0)), 1e-30)
    solved = milp(
        np.where(possible, costs, 0.0).ravel() / scale,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(sizes.ravel()[None] / budget, ub=1.0),
        ],
        bounds=Bounds(0, possible.ravel().astype(float)),
        integrality=np.ones(costs.size),
        options={"mip_rel_gap": 0.0},
    )
    assert solved.x is not None, solved.message
    return solved.x.reshape(costs.shape).argmax(1).tolist()


@dataclass(frozen=True)
class Allocation:
    """The grid of each matrix, and what it rests on."""

    formats: dict[str, Grid]
    facts: dict[str, Any]


def allocation_of(
    model: PreTrainedModel,
    names: Sequence[str],
    grids: Sequence[Grid],
    group_size: int,
    rows: Sequence[Row],
    context: Context,
) -> Allocation:
    """The grids that move predictions least, in as many bytes as 4 bits in groups of `group_size` take."""
    costs = sensitivities(model, names, grids, rows, context.pad, context.report)
    shapes = [_shape(model.get_submodule(name)) for name in names]
    sizes = np.array(
        [[grid_bytes(grid, *shape) if fits(grid, shape[1]) else 0 for grid in grids] for shape in shapes]
    )
    budget = sum(grid_bytes(Grid(4, group_size), *shape) for shape in shapes)
    chosen = allocate(costs, sizes, budget)
    uniform = list(grids).index(Grid(4, group_size))
    sums = {
        "allocated_kl": sum(float(costs[i, j]) for i, j in enumerate(chosen)),
        "uniform_kl": float(costs[:, uniform].sum()),
        "allocated_bytes": sum(float(sizes[i, j]) for i, j in enumerate(chosen)),
        "uniform_bytes": float(budget),
    }
    moved = {name: float(cost) for name, cost in zip(names, costs[:, uniform], strict=True)}
    formats = {name: grids[j] for name, j in zip(names, chosen, strict=True)}
    facts = {**sums, "kl_by_matrix": moved, "grids": {name: str(grid) for name, grid in formats.items()}}
    return Allocation(formats, facts)


def _shape(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a matrix."""
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def sensitivities(
    model: PreTrainedModel,
    names: Sequence[str],
    grids: Sequence[Grid],
    rows: Sequence[Row],
    pad: int,
    report: Callable[[float], None],
) -> np.ndarray:
    """[M, F] how far predictions move where one matrix alone is rounded; infinite where it cannot be.

    KL(as it is || rounded) in nats per token, over at most `POSITIONS` of the tokens, at even distances. What
    reaches a layer is kept until the next one: a matrix costs the layers from its own on.
    """
    size = tokens_per_batch(model.config.get_text_config().vocab_size, model.device)
    walk = Walk(model, rows, pad, size)
    masks = _compared(walk.batches)
    before = list(_answers(walk, 0, masks))
    costs, done = np.full((len(names), len(grids)), np.inf), 0
    for index, places in enumerate(_by_layer(model, walk.layers, names)):
        for i in places:
            inputs = _shape(model.get_submodule(names[i]))[1]
            for j, grid in enumerate(grids):
                if fits(grid, inputs):
                    with _rounded(model, names[i], grid):
                        costs[i, j] = _divergence(before, _answers(walk, index, masks))
            done += 1
            report(done / len(names))
        if index < len(walk.layers):
            walk.leave(index)
    return costs


def _by_layer(model: PreTrainedModel, layers: nn.ModuleList, names: Sequence[str]) -> list[list[int]]:
    """Numbers of the matrices of each layer, those before them with the first; last that of the head."""
    owner = {id(model.get_output_embeddings()): len(layers)}
    for index, layer in enumerate(layers):
        for module in layer.modules():
            owner.setdefault(id(module), index)  # one that several layers share: the first
    places: list[list[int]] = [[] for _ in range(len(layers) + 1)]
    for i, name in enumerate(names):
        places[owner.get(id(model.get_submodule(name)), 0)].append(i)
    return places


def _answers(walk: Walk, index: int, masks: Sequence[Tensor]) -> Iterator[Tensor]:
    """[N, V] float32 of every batch, from the layer `index` on."""
    every = iter(masks)
    return walk.onward(index, lambda batch: _log_probs(walk.model, batch, next(every)))


def _compared(given: Sequence[Batch]) -> list[Tensor]:
    """Of each batch the mask [B, T] of the positions that are compared."""
    step = max(1, sum(int(batch.mask.sum()) for batch in given) // POSITIONS)
    masks = list[Tensor]()
    for batch in given:
        mask = torch.nn.functional.pad(batch.mask, (0, 1))
        places = mask.flatten().nonzero()[::step, 0]
        chosen = torch.zeros_like(mask).flatten()
        chosen[places] = True
        masks.append(chosen.view_as(mask))
    return masks


@torch.no_grad()
def _log_probs(model: PreTrainedModel, batch: Batch, mask: Tensor) -> Tensor:
    """[N, V] float32."""
    return plain_output(model, batch=batch).select(mask).log_softmax(0, int(mask.sum()))


def _divergence(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for p, q in zip(before, after, strict=True):
        total += float(kl_divergence(p, q).sum(dtype=torch.float64))
        count += len(p)
    return max(0.0, total / count)


@contextmanager
def _rounded(model: PreTrainedModel, name: str, grid: Grid) -> Iterator[None]:
    """The forward pass sees one matrix on a grid inside."""
    put_on_grid(model, [name], grid)
    try:
        yield
    finally:
        remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=False)
