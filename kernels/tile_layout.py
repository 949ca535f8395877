"""The tiles that the native CPU kernels read, and the way back. `WeightLayout.TILES` says how they lie.

Legend: N = out features, K = in features, G = groups along K.
"""

import torch
from torch import Tensor

from kernels.layout import NIBBLE_BITS, GroupCodes, PackedWeight, WeightLayout, pack, unpack

TILE_OUTPUTS = 16
# inputs whose codes of one output are neighbours: what one 32-bit lane of a dot product takes
LANE_INPUTS = 4
# the columns of activations that share a scale; each must lie in one group of the weight
ACTIVATION_BLOCKS = (64, 32)


def activation_block(group_size: int) -> int:
    """How many columns of an activation share a scale before a weight with these groups. ValueError where none fits."""
    for block in ACTIVATION_BLOCKS:
        if group_size % block == 0:
            return block
    raise ValueError(f"the native CPU kernel reads group sizes that are multiples of 32, not {group_size}")


def repack_tiles(weight: PackedWeight) -> PackedWeight:
    """A ROW_MAJOR weight as TILES; nothing is rounded. Raises ValueError when the group size is no multiple of 32."""
    activation_block(weight.group_size)
    plain = unpack(weight)
    padding = -weight.shape[0] % TILE_OUTPUTS
    codes = torch.nn.functional.pad(plain.codes, (0, 0, 0, padding))
    if weight.bits in NIBBLE_BITS:
        halves = _split_lanes(codes, 2)
        codes = halves[:, :, 0] | (halves[:, :, 1] << 4)
    else:
        codes = _split_lanes(codes, 1)
    scales = _tile_groups(plain.scales if plain.scales.dtype == torch.float16 else plain.scales.float(), padding)
    zeros = _tile_groups(plain.zeros, padding)
    return PackedWeight(
        codes=codes.flatten(1).contiguous(),
        scales=scales,
        zeros=zeros,
        shape=weight.shape,
        bits=weight.bits,
        group_size=weight.group_size,
        layout=WeightLayout.TILES,
    )


def unpack_tiles(weight: PackedWeight) -> PackedWeight:
    """The inverse of `repack_tiles`, but for scales of bfloat16, which come back as float32."""
    num_rows, num_columns = weight.shape
    lanes = weight.codes.view(len(weight.codes), -1, TILE_OUTPUTS, LANE_INPUTS)
    halves = (lanes & 0xF, lanes >> 4) if weight.bits in NIBBLE_BITS else (lanes,)
    codes = torch.stack(halves, dim=2).permute(0, 3, 1, 2, 4).reshape(-1, num_columns)
    scales, zeros = (values.transpose(1, 2).flatten(0, 1)[:num_rows] for values in (weight.scales, weight.zeros))
    return pack(GroupCodes(codes[:num_rows].contiguous(), scales, zeros, weight.bits, weight.group_size))


def _split_lanes(codes: Tensor, num_halves: int) -> Tensor:
    """uint8 [N', K] as [tiles, steps, halves, 16 outputs, 4 inputs], or without the halves where there is one."""
    split = codes.view(-1, TILE_OUTPUTS, codes.shape[1] // (LANE_INPUTS * num_halves), num_halves, LANE_INPUTS)
    ordered = split.permute(0, 2, 3, 1, 4)
    return ordered if num_halves > 1 else ordered[:, :, 0]


def _tile_groups(values: Tensor, padding: int) -> Tensor:
    """[N, G] as [tiles, G, 16]."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, padding))
    return padded.view(-1, TILE_OUTPUTS, values.shape[1]).transpose(1, 2).contiguous()
