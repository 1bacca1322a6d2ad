"""The bounds of quantized formats: right ones hold for random matrices, damage is seen."""

import pytest
import torch

from compress.tensors.quant_error import (
    INT4_STEP,
    INT4_SUBNORMAL,
    INT8_STEP,
    INT8_SUBNORMAL,
    NF4_GAP,
    check_rounding,
    worst_error,
)
from eval.core.errors import UserError


def quantized(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Symmetric levels, float16 scales and products: what the bounds are stated for."""
    top = 2 ** (bits - 1)
    groups = weight.reshape(-1, group)
    scale = (groups.abs().amax(dim=1, keepdim=True) / top).half().float()
    levels = (groups / scale).round().clamp(-top, top - 1)
    return (levels * scale).half().float().reshape(weight.shape)


@pytest.mark.parametrize(("bits", "bound"), [(8, INT8_STEP), (4, INT4_STEP)])
@pytest.mark.parametrize("seed", range(5))
def test_bounds_hold_and_are_near(bits, bound, seed):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(seed))
    worst = check_rounding("w", weight, quantized(weight, bits, 32), 32, bound)
    assert bound / 3 < worst


@pytest.mark.parametrize(
    ("bits", "bound", "least"), [(8, INT8_STEP, INT8_SUBNORMAL), (4, INT4_STEP, INT4_SUBNORMAL)]
)
@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7, 1e-9])
def test_tiny_weights_are_allowed_what_a_float16_scale_leaves_open(bits, bound, least, size):
    """The row of a padding token after training: its scale is subnormal in float16, or zero."""
    weight = size * torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    top = 2 ** (bits - 1)
    scale = weight.abs().amax(dim=1, keepdim=True) / top
    levels = (weight / scale).round().clamp(-top, top - 1)
    restored = levels * scale.half().float()
    check_rounding("w", weight, restored, None, bound, least)
    if size < 1e-5:
        with pytest.raises(UserError, match="round-trip error"):
            check_rounding("w", weight, restored, None, bound)
    with pytest.raises(UserError, match="round-trip error"):
        check_rounding(
            "w", weight, restored + 2 * (least + bound * float(weight.abs().max())), None, bound, least
        )


def test_a_shift_by_one_group_is_refused():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    wrong = quantized(weight, 8, 32).roll(32, dims=1)
    with pytest.raises(UserError, match=r"quantized matrix w \(64, 128\): round-trip error"):
        check_rounding("w", weight, wrong, 32, INT8_STEP)


def test_the_group_matters():
    """A row with one giant: what is right for the row is wrong for the groups without it."""
    weight = torch.ones(1, 64)
    weight[0, 0] = 1000.0
    restored = weight + 1.0
    assert worst_error(weight, restored, None) == pytest.approx(0.001)
    assert worst_error(weight, restored, 32) == pytest.approx(1.0)


@pytest.mark.parametrize("damage", [1e-3, float("nan"), float("inf")])
def test_zeros_must_stay_zero(damage):
    restored = torch.zeros(2, 8)
    assert worst_error(torch.zeros(2, 8), restored, None) == 0
    restored[1, 3] = damage
    assert worst_error(torch.zeros(2, 8), restored, None) == float("inf")
    assert worst_error(torch.zeros(2, 8), restored, None, least=1.0) == float("inf")


def test_the_widest_gap_of_nf4():
    functional = pytest.importorskip("bitsandbytes.functional")
    levels = functional.get_4bit_type("nf4", device="cpu").sort().values
    assert float((levels[1:] - levels[:-1]).max()) / 2 == pytest.approx(NF4_GAP, abs=1e-6)
