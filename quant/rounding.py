"""Rounds weights to codes, group by group, against the scale that will be stored. It searches nothing.

Legend: N = out features, K = in features, G = groups along K, g = group size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import GroupCodes
from kernels.weight_kinds import WHOLE_ROW

# checkpoints hold scales in this dtype, so codes are chosen against values that it can hold
SCALE_DTYPE = torch.float16
# the smallest positive float16: an all-zero group gets it, so that no scale is ever 0
MIN_SCALE = 2.0**-24


@dataclass(frozen=True)
class GroupRange:
    """The interval that a group's codes span: low <= 0 <= high, both float32 [..., N, G]."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class GroupGrid:
    """The values a group can take: (code - zeros) * scales, both float32 [..., N, G]; scales fit float16 exactly."""

    scales: Tensor
    zeros: Tensor


def split_groups(weight: Tensor, group_size: int) -> Tensor:
    """[..., K] as [..., G, g]; WHOLE_ROW is one group of K."""
    width = weight.shape[-1] if group_size == WHOLE_ROW else group_size
    return weight.reshape(*weight.shape[:-1], -1, width)


def full_range(weight: Tensor, group_size: int) -> GroupRange:
    """The range of every group of weight [..., N, K], widened to hold 0.

    Without 0 the zero point of a group of one sign leaves the code range and clamping it destroys the group.
    """
    groups = split_groups(weight, group_size)
    return GroupRange(low=groups.amin(dim=-1).clamp(max=0), high=groups.amax(dim=-1).clamp(min=0))


def grid_of(group_range: GroupRange, bits: int) -> GroupGrid:
    """The grid whose ends are the range's, with the scale as stored and an integer zero point inside the codes."""
    largest = 2**bits - 1
    scales = ((group_range.high - group_range.low) / largest).to(SCALE_DTYPE).float().clamp(min=MIN_SCALE)
    zeros = (-group_range.low / scales).round_().clamp_(0, largest)
    return GroupGrid(scales=scales, zeros=zeros)


def round_onto(weight: Tensor, grid: GroupGrid, bits: int) -> Tensor:
    """Each value of weight [..., N, K] replaced by the nearest one on its group's grid, float32."""
    groups = split_groups(weight, weight.shape[-1] // grid.scales.shape[-1])
    scales, zeros = grid.scales[..., None], grid.zeros[..., None]
    codes = (groups / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)
    return torch.mul(codes.sub_(zeros), scales).flatten(-2)


def round_plainly(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Round to nearest over each group's full range: the dequantized float32 of the shape of weight [..., N, K]."""
    return round_onto(weight, grid_of(full_range(weight, group_size), bits), bits)


def codes_of(weight: Tensor, grid: GroupGrid, bits: int) -> GroupCodes:
    """The codes of weight [N, K] on its grid, in the form that `kernels.layout.pack` takes."""
    groups = split_groups(weight, weight.shape[-1] // grid.scales.shape[-1])
    scales, zeros = grid.scales[..., None], grid.zeros[..., None]
    codes = (groups / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)
    return GroupCodes(
        codes=codes.flatten(-2).to(torch.uint8),
        scales=grid.scales.to(SCALE_DTYPE),
        zeros=grid.zeros.to(torch.uint8),
        bits=bits,
        group_size=groups.shape[-1],
    )
