"""Weights of a mixture of experts side by side, and which rows go to which expert. No device waits for another here.

Legend: T = tokens, C = choices of a token (top-k), A = T * C assignments, E = experts, N = out, K = in features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.layout import PackedWeight, WeightLayout, half_scales


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
class Routing:
    """experts: int64 [T, C], the choices of each token, the likeliest first. weights: float32 [T, C], theirs."""

    experts: Tensor
    weights: Tensor


@dataclass(frozen=True)
class SortedRows:
    """order: int32 [A], assignments by expert, in their own order within one. tile_experts: int32 [tiles].

    tile_rows: int32 [tiles, 2], the part of `order` that each tile multiplies, at most max_tile_rows; empty for tiles
    that are not needed.
    """

    order: Tensor
    tile_experts: Tensor
    tile_rows: Tensor
    max_tile_rows: int
    num_experts: int


def with_scales_alike(weights: Sequence[PackedWeight]) -> list[PackedWeight]:
    """ROW_MAJOR weights with float32 scales in the 16 bits that hold them all, where each would choose for itself."""
    if weights[0].scales.dtype != torch.float32:
        return list(weights)
    scales = half_scales(torch.cat([weight.scales for weight in weights]))
    parts = torch.split(scales, [weight.shape[0] for weight in weights])
    return [replace(weight, scales=part) for weight, part in zip(weights, parts, strict=True)]


def stack_experts(weights: Sequence[PackedWeight]) -> PackedExperts:
    """PLANAR weights of equal shape, bits, groups and type of scales, side by side; ValueError when they differ."""
    first = weights[0]
    for weight in weights:
        if weight.layout is not WeightLayout.PLANAR:
            raise ValueError(f"experts are stacked in the planar layout, not {weight.layout.value}: see repack_planar")
        if (weight.shape, weight.bits, weight.group_size) != (first.shape, first.bits, first.group_size):
            raise ValueError(
                f"experts of a layer must agree: {list(first.shape)}, {first.bits} bits, group {first.group_size} "
                f"against {list(weight.shape)}, {weight.bits} bits, group {weight.group_size}"
            )
        if weight.scales.dtype != first.scales.dtype:
            raise ValueError(f"scales of a layer's experts must agree: {first.scales.dtype}, {weight.scales.dtype}")
    return PackedExperts(
        codes=torch.stack([weight.codes for weight in weights]),
        scales=torch.stack([weight.scales for weight in weights]),
        shape=first.shape,
        bits=first.bits,
        group_size=first.group_size,
    )


def num_tiles_of(num_assignments: int, num_experts: int, max_tile_rows: int) -> int:
    """As many as the worst routing needs, where each expert leaves one unfilled: a captured graph replays any."""
    return num_assignments // max_tile_rows + min(num_experts, num_assignments)
