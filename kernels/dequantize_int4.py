"""A planar weight as a dense one, for products of so many rows that the tensor cores, not the memory, set the pace.

Legend: N = out features, K = in features.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int4_tile import TILE_COLUMNS_STORED, WORD_ROWS, pair_scales, plane_pair, weight_unit
from kernels.launch import FUSE_FLOATS, HALF_TYPES, IS_INTERPRETED, launch_arch
from kernels.layout import PackedWeight, WeightLayout
from kernels.tiles import DEQUANTIZING_WARPS


@triton.jit(do_not_specialize=["num_columns", "num_blocks"])
def dequantize_int4_kernel(
    words_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    num_inputs: tl.tensor,
    num_blocks: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES_ARE_BF16: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (block of K, tile of 128 columns) writes (code - zero) * scale to out [N, K], rounded to its dtype."""
    PLANES: tl.constexpr = 16 // BITS
    BLOCK: tl.constexpr = PLANES * WORD_ROWS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block = tl.program_id(0)
    tile = tl.program_id(1)
    columns = tl.arange(0, TILE_COLUMNS_STORED)
    word_rows = tl.arange(0, WORD_ROWS)
    block_index = tile.to(tl.int64) * num_blocks + block
    words_ptr += block_index * (WORD_ROWS * TILE_COLUMNS_STORED)
    pairs_ptr += block_index * (BLOCK // GROUP_SIZE * TILE_COLUMNS_STORED)
    words = tl.load(words_ptr + word_rows[None, :] * TILE_COLUMNS_STORED + columns[:, None])
    out_columns = tile * TILE_COLUMNS_STORED + columns
    row_ptr = out_ptr + out_columns.to(tl.int64)[:, None] * num_inputs
    inside = (out_columns < num_columns)[:, None]
    for pair in tl.static_range(PLANES // 2):
        low_pairs = tl.load(pairs_ptr + 2 * pair * WORD_ROWS // GROUP_SIZE * TILE_COLUMNS_STORED + columns)
        high_pairs = tl.load(pairs_ptr + (2 * pair + 1) * WORD_ROWS // GROUP_SIZE * TILE_COLUMNS_STORED + columns)
        low, high = plane_pair(words, low_pairs, high_pairs, pair, BITS, dtype, INTERPRETED)
        low_scales = (pair_scales(low_pairs, SCALES_ARE_BF16) * weight_unit(BITS, dtype))[:, None]
        high_scales = (pair_scales(high_pairs, SCALES_ARE_BF16) * weight_unit(BITS, dtype))[:, None]
        inputs = block * BLOCK + 2 * pair * WORD_ROWS + word_rows[None, :]
        tl.store(row_ptr + inputs, (low.to(tl.float32) * low_scales).to(dtype), mask=inside & (inputs < num_inputs))
        inputs += WORD_ROWS
        tl.store(row_ptr + inputs, (high.to(tl.float32) * high_scales).to(dtype), mask=inside & (inputs < num_inputs))


def dequantize_int4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """A PLANAR weight as dense [N, K] in float16 or bfloat16, each weight rounded once.

    Raises ValueError for another layout or dtype.
    """
    if weight.layout is not WeightLayout.PLANAR:
        raise ValueError(f"dequantize_int4 reads the planar layout, not {weight.layout.value}: see repack_planar")
    if dtype not in HALF_TYPES:
        raise ValueError(f"dequantize_int4 writes float16 or bfloat16, not {dtype}")
    launch_arch({"codes": weight.codes, "scales": weight.scales})
    out = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    num_tiles, num_blocks = weight.codes.shape[:2]
    dequantize_int4_kernel[(num_blocks, num_tiles)](
        weight.codes,
        weight.scales.view(torch.int32),
        out,
        *weight.shape,
        num_blocks,
        BITS=8 if weight.bits == 8 else 4,
        GROUP_SIZE=weight.group_size,
        SCALES_ARE_BF16=weight.scales.dtype == torch.bfloat16,
        INTERPRETED=IS_INTERPRETED,
        num_warps=DEQUANTIZING_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return out
