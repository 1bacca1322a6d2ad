"""Training of weights that are rounded in every forward pass, as an export will round them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from transformers.pytorch_utils import Conv1D

from compress.recipe import Grid
from compress.tensors.grid import round_to_grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StraightThrough(torch.autograd.Function):
    """Rounds; its gradient is that of the rounded weight, as if nothing were rounded.

    Straight-through estimator (Bengio, Léonard and Courville 2013, arXiv:1308.3432).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, grid: Grid) -> Tensor:
        return round_to_grid(weight, grid.bits, grid.group_size).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class OnGrid(nn.Module):
    """The parametrization of a weight [O, I] that the forward pass sees on a grid.

    Args:
        by_columns: the weight is stored [I, O], as GPT-2's are.
    """

    def __init__(self, grid: Grid, by_columns: bool) -> None:
        super().__init__()
        self.grid, self.by_columns = grid, by_columns

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.T if self.by_columns else weight
        rounded: Tensor = StraightThrough.apply(rows, self.grid)
        return rounded.T if self.by_columns else rounded


def put_on_grid(model: PreTrainedModel, names: Iterable[str], grid: Grid) -> None:
    """From here on the matrices called so are rounded in every forward pass; what is trained is not."""
    for name in names:
        module = model.get_submodule(name)
        register_parametrization(module, "weight", OnGrid(grid, isinstance(module, Conv1D)), unsafe=True)


def keep_rounded(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Makes the rounded weights those of the model, and ends the rounding."""
    for name in names:
        remove_parametrizations(model.get_submodule(name), "weight", leave_parametrized=True)
