"""Weights on the levels of a low-bit format, as exports round them: a pure function of tensors."""

import torch
from torch import Tensor


def round_to_grid(weight: Tensor, bits: int, group: int) -> Tensor:
    """The weights [O, I] on symmetric levels, in float32.

    A group of neighbouring inputs shares one scale, which has the sign that puts the largest weight on the
    level -2^(bits - 1), the one without a counterpart (`_calculate_signed_scale` of NNCF 3; ONNX Runtime and
    llama.cpp do so too). So rounding again changes nothing, nor does a format of more bits in the same
    groups: its scale is a power of two smaller. The scale is kept to bfloat16's 8 bits, where NNCF keeps
    float16's 11: up to 4 bits its products with levels are then exact in float16, in which OpenVINO
    multiplies.

    Args:
        group: inputs that share a scale; -1: all of a row.
    """
    groups = weight.float().unflatten(-1, (-1, weight.shape[-1] if group < 0 else group))
    low, high = groups.amin(-1, keepdim=True).abs(), groups.amax(-1, keepdim=True)
    top, least = 2 ** (bits - 1), torch.finfo(torch.float32).eps
    scale = torch.where(low >= high, low, -high) / top
    scale = torch.where(scale.abs() < least, least, scale)
    levels = (groups / scale).round_().clamp_(-top, top - 1)
    return levels.mul_(scale.bfloat16().half().float()).flatten(-2)
