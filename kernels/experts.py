"""Weights of a mixture of experts side by side, and which rows go to which expert. No device waits for another here.

Legend: T = tokens, C = choices of a token (top-k), A = T * C assignments, E = experts, N = out, K = in features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import check_half, launch_arch
from kernels.layout import PackedWeight, WeightLayout


@dataclass(frozen=True)
class PackedExperts:
    """PLANAR weights [N, K] of all experts: codes and scales as `WeightLayout.PLANAR` says, with a leading axis E."""

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int

    @property
    def num_experts(self) -> int:
        return len(self.codes)


@dataclass(frozen=True)
class ExpertOrder:
    """experts: int64 [A], the expert of each assignment; a token's choices are neighbours. num_experts: E."""

    experts: Tensor
    num_experts: int


@dataclass(frozen=True)
class SortedRows:
    """order: int32 [A], assignments by expert, in their own order within one. tile_experts: int32 [tiles].

    tile_rows: int32 [tiles, 2], the part of `order` that each tile multiplies; empty for tiles that are not needed.
    """

    order: Tensor
    tile_experts: Tensor
    tile_rows: Tensor


def stack_experts(weights: Sequence[PackedWeight]) -> PackedExperts:
    """PLANAR weights of equal shape, bits and groups, side by side. Raises ValueError when they differ."""
    first = weights[0]
    for weight in weights:
        if weight.layout is not WeightLayout.PLANAR:
            raise ValueError(f"experts are stacked in the planar layout, not {weight.layout.value}: see repack_planar")
        if (weight.shape, weight.bits, weight.group_size) != (first.shape, first.bits, first.group_size):
            raise ValueError(
                f"experts of a layer must agree: {list(first.shape)}, {first.bits} bits, group {first.group_size} "
                f"against {list(weight.shape)}, {weight.bits} bits, group {weight.group_size}"
            )
    return PackedExperts(
        codes=torch.stack([weight.codes for weight in weights]),
        scales=torch.stack([weight.scales for weight in weights]),
        shape=first.shape,
        bits=first.bits,
        group_size=first.group_size,
    )


def sorted_by_expert(order: ExpertOrder, tile_rows: int) -> SortedRows:
    """Cut the assignments of each expert into tiles of up to tile_rows. The number of tiles hangs on A and E alone.

    So a captured graph replays it for any routing: it has as many tiles as the worst one needs.
    """
    experts = order.experts
    num_assignments = len(experts)
    counts = torch.bincount(experts, minlength=order.num_experts)
    ends = counts.cumsum(0)
    tiles = (counts + tile_rows - 1) // tile_rows
    tile_ends = tiles.cumsum(0)
    # each expert with rows may leave one tile unfilled
    num_tiles = num_assignments // tile_rows + min(order.num_experts, num_assignments)
    indices = torch.arange(num_tiles, device=experts.device)
    tile_experts = torch.searchsorted(tile_ends, indices, right=True).clamp_(max=order.num_experts - 1)
    index_in_expert = indices - (tile_ends - tiles)[tile_experts]
    first_rows = (ends - counts)[tile_experts] + index_in_expert * tile_rows
    # a tile past the last has the last expert, and begins at or behind its end
    last_rows = torch.minimum(first_rows + tile_rows, ends[tile_experts])
    return SortedRows(
        order=experts.argsort(stable=True).to(torch.int32),
        tile_experts=tile_experts.to(torch.int32),
        tile_rows=torch.stack((first_rows, last_rows), dim=1).to(torch.int32),
    )


def check_grouped(x: Tensor, weight: PackedExperts, order: ExpertOrder) -> int:
    """The architecture to launch for. Raises ValueError, saying what would be right, for operands that do not fit."""
    num_inputs = weight.shape[1]
    if x.ndim != 2 or x.shape[1] != num_inputs:
        raise ValueError(f"x must be [T, {num_inputs}] for experts of {list(weight.shape)}, not {list(x.shape)}")
    check_half("x", x)
    if x.stride(1) != 1:
        raise ValueError(f"the columns of x must be neighbours in memory; they are {x.stride(1)} elements apart")
    if order.experts.dtype != torch.int64 or order.experts.ndim != 1:
        raise ValueError(f"experts must be int64 [A], not {order.experts.dtype} {list(order.experts.shape)}")
    if order.num_experts != weight.num_experts:
        raise ValueError(f"rows are routed to {order.num_experts} experts, and there are {weight.num_experts}")
    num_assignments = len(order.experts)
    if num_assignments and (not len(x) or num_assignments % len(x)):
        raise ValueError(f"{num_assignments} assignments do not fall evenly on {len(x)} rows of x")
    return launch_arch({"x": x, "codes": weight.codes, "scales": weight.scales, "experts": order.experts})
