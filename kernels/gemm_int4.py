"""INT4 linear layer for many rows (prefill): one program sums all of K, in the few-row kernel's order."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int4_operands import check_linear, whole_blocks
from kernels.int4_tile import multiply_blocks, store_tile
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED
from kernels.layout import PackedWeight
from kernels.tiles import MAX_REGISTERS, many_rows_tile, num_splits


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_splits"])
def gemm_int4_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_blocks: tl.tensor,
    x_stride: tl.tensor,
    num_splits: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES_ARE_BF16: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (row tile, column tile) writes one tile of out [M, N]. Operands as in `multiply_blocks`.

    K is cut where the few-row kernel cuts it and the parts are added in its order: the same row has the same bits.
    """
    # row tiles are the fast axis: programs that run together share a tile of the weight
    first_row = tl.program_id(0) * TILE_ROWS
    tile_rows = tl.arange(0, TILE_ROWS)
    first_column = tl.program_id(1) * TILE_COLUMNS
    # 64-bit: the activations of a long prompt hold more than 2**31 elements
    x_ptr += first_row.to(tl.int64) * x_stride
    row_offsets = tl.minimum(tile_rows, num_rows - 1 - first_row) * x_stride
    blocks_per_split = tl.cdiv(num_blocks, num_splits)
    total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
    for split in range(num_splits):
        first_block = split * blocks_per_split
        total += multiply_blocks(
            x_ptr,
            words_ptr,
            pairs_ptr,
            row_offsets,
            first_column,
            first_block,
            tl.minimum(first_block + blocks_per_split, num_blocks),
            num_blocks,
            BITS,
            GROUP_SIZE,
            SCALES_ARE_BF16,
            TILE_ROWS,
            TILE_COLUMNS,
            INTERPRETED,
        )
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    store_tile(out_ptr, bias_ptr, total, first_row + tile_rows, columns, num_rows, num_columns)


def gemm_int4(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] fp16 or bf16, any M, times a PLANAR weight [N, K] transposed, plus bias [N]: [M, N] in x's dtype.

    The same sums in the same order as `gemv_int4`, in tiles for many rows. Raises ValueError for operands that do
    not fit.
    """
    operands = check_linear(x, weight, bias)
    tile = many_rows_tile(operands.arch, weight.group_size)
    out = torch.empty((operands.num_rows, operands.num_columns), dtype=x.dtype, device=x.device)
    if operands.num_rows == 0:
        return out
    padded = whole_blocks(x, weight)
    grid = (triton.cdiv(operands.num_rows, tile.num_rows), triton.cdiv(operands.num_columns, tile.num_columns))
    gemm_int4_kernel[grid](
        padded,
        weight.codes,
        weight.scales.view(torch.int32),
        bias,
        out,
        operands.num_rows,
        operands.num_columns,
        operands.num_blocks,
        padded.stride(0),
        num_splits(operands.arch, operands.num_columns, operands.num_blocks),
        BITS=operands.stored_bits,
        GROUP_SIZE=weight.group_size,
        SCALES_ARE_BF16=weight.scales.dtype == torch.bfloat16,
        TILE_ROWS=tile.num_rows,
        TILE_COLUMNS=tile.num_columns,
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=MAX_REGISTERS.get(operands.arch),
        enable_fp_fusion=FUSE_FLOATS,
    )
    return out
