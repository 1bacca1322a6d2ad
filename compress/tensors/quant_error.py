"""How far a quantized matrix may be from its original: pure functions, used by every pass that quantizes."""

import torch
from torch import Tensor

from eval.core.errors import UserError

# Worst |w - q| by the largest |w| of its group, from the levels of each format. Symmetric n-bit levels run
# from -2^(n-1) to 2^(n-1) - 1 by a scale of max|w| / 2^(n-1): the end without a level is cut by a whole step.
HALVES = 2.0**-10  # a float16 scale and a float16 product, each rounded by at most 2^-11
INT8_STEP = 1 / 128 + HALVES
INT4_STEP = 1 / 8 + HALVES
INT8_ROUNDED = 0.5 / 127 + HALVES  # levels -127..127 of a weight first rounded to float16: half a step
NF4_GAP = (1.0 - 0.6961928) / 2  # half of the widest gap of NF4 (Dettmers et al. 2023, appendix E)
# Unsigned levels span from the least weight to the largest, at most twice as far; a rounded zero point adds
# half a step to the half that rounding takes. Of 8 bits that is no more than a symmetric step.
UINT4_STEP = 2 / 15 + HALVES
MOVED = 0.5  # norm of what is moved by that of the matrix, at most; rounding to 4 bits moves 0.1
SLACK = 1.001  # float32 arithmetic
# Below its normal numbers a float16 is rounded by up to 2^-25, whatever its size: so is the scale of tiny
# weights, which up to 128 levels multiply, or 8.
HALF_SUBNORMAL = 2.0**-25
INT8_SUBNORMAL, INT4_SUBNORMAL = (128 + 1) * HALF_SUBNORMAL, (8 + 1) * HALF_SUBNORMAL


def worst_error(original: Tensor, restored: Tensor, group: int | None, least: float = 0.0) -> float:
    """Largest |original - restored| of [O, I], each by the largest |original| of its group.

    Groups are `group` neighbouring inputs of a row, or whole rows. A group of zeros must stay zero: any
    error there counts as infinite, and so does a value that is not finite.

    Args:
        least: what the smallest numbers of the format leave open in other groups; only more than it counts.
    """
    assert original.shape == restored.shape, f"{tuple(original.shape)} and {tuple(restored.shape)}"
    width = group or original.shape[-1]
    old, new = (t.detach().float().cpu().reshape(-1, width) for t in (original, restored))
    error, scale = (old - new).abs().amax(dim=1), old.abs().amax(dim=1)
    beyond = (error - least * (scale > 0)).clamp(min=0)
    ratio = torch.where(beyond == 0, 0.0, beyond / scale)
    return float(torch.nan_to_num(ratio, nan=torch.inf, posinf=torch.inf).max())


def check_rounding(
    name: str, original: Tensor, restored: Tensor, group: int | None, bound: float, least: float = 0.0
) -> float:
    """The worst error of one matrix, by the largest weight of its group; see `worst_error`.

    Raises:
        UserError: it is above `bound`: the library that quantized it computes something else here.
    """
    worst = worst_error(original, restored, group, least)
    if worst > bound * SLACK:
        raise UserError(
            f"quantized matrix {name} {tuple(original.shape)}",
            f"round-trip error {worst:.4f} of the largest weight of its group",
            f"the format allows at most {bound:.4f}: leave the recipe out: its library rounds otherwise",
        )
    return worst


def check_scaled(name: str, original: Tensor, restored: Tensor) -> tuple[float, float]:
    """How far a matrix [O, I] was moved beyond a scale of each row and input, and how far scales are from 1.

    Algorithms such as AWQ move scales from one matrix to another, and GPTQ moves weights by more than a step:
    the bound of a single weight says nothing of them.

    Returns:
        norm of what was moved by that of the matrix; the largest change of a scale, as a natural logarithm.

    Raises:
        UserError: the first is above `MOVED`: the library that quantized it computes something else here.
    """
    old, new = original.detach().double(), restored.detach().double()
    change = 0.0
    for axis in (1, 0):  # least squares: of one axis, then of the other
        power = old.square().sum(axis, keepdim=True)
        scale = torch.where(power > 0, (old * new).sum(axis, keepdim=True) / power, 1.0)
        change = max(change, float(scale.clamp(min=1e-9).log().abs().max()))
        old = old * scale
    moved = float((old - new).norm() / new.norm().clamp(min=1e-300))
    if not moved <= MOVED:
        raise UserError(
            f"quantized matrix {name} {tuple(original.shape)}",
            f"moved by {moved:.3f} of its norm, scales aside",
            f"at most {MOVED} can be explained: leave the recipe out: its library rounds otherwise",
        )
    return moved, change
