"""INT4 linear layer for few rows (decode): K is split over programs, and a second kernel adds the parts in order."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.int4_operands import LinearOperands, check_linear, whole_blocks
from kernels.int4_tile import multiply_blocks, store_tile
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED
from kernels.layout import PackedWeight
from kernels.tiles import COPY_WARPS, FEW_ROWS_MAX_REGISTERS, SUM_COLUMNS, few_rows_tile, num_splits


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def gemv_int4_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_blocks: tl.tensor,
    x_stride: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES_ARE_BF16: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (column tile, split) sums its K blocks into out [num_splits, M, N]; all rows are in one tile.

    Operands as in `multiply_blocks`. With one split, out is the answer in its dtype; else float32 parts, no bias.
    """
    first_column = tl.program_id(0) * TILE_COLUMNS
    split = tl.program_id(1)
    rows = tl.arange(0, TILE_ROWS)
    blocks_per_split = tl.cdiv(num_blocks, tl.num_programs(1))
    first_block = split * blocks_per_split
    total = multiply_blocks(
        x_ptr,
        words_ptr,
        pairs_ptr,
        tl.minimum(rows, num_rows - 1) * x_stride,
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
    part_ptr = out_ptr + split.to(tl.int64) * num_rows * num_columns
    columns = first_column + tl.arange(0, TILE_COLUMNS)
    store_tile(part_ptr, bias_ptr, total, rows, columns, num_rows, num_columns)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def sum_parts_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_splits: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Program (row, column tile) adds parts float32 [num_splits, M, N] from first to last, then bias [N], into out."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < num_columns
    offsets = row * num_columns + columns
    total = tl.load(parts_ptr + offsets, mask=inside, other=0.0)
    for split in range(1, num_splits):
        part_ptr = parts_ptr + tl.cast(split, tl.int64) * num_rows * num_columns
        total += tl.load(part_ptr + offsets, mask=inside, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


def gemv_int4(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] fp16 or bf16, M up to 64, times a PLANAR weight [N, K] transposed, plus bias [N]: [M, N] in x's dtype.

    The weight's integers are multiplied, summed in float32 and scaled once a group. A row's bits depend on the weight
    and the architecture, not on M. Raises ValueError for operands that do not fit.
    """
    operands = check_linear(x, weight, bias)
    tile = few_rows_tile(operands.arch, operands.num_rows, weight.group_size)
    splits = num_splits(operands.arch, operands.num_columns, operands.num_blocks)
    out = torch.empty((operands.num_rows, operands.num_columns), dtype=x.dtype, device=x.device)
    if operands.num_rows == 0:
        return out
    is_split = splits > 1
    parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device) if is_split else out
    padded = whole_blocks(x, weight)
    grid = (triton.cdiv(operands.num_columns, tile.num_columns), splits)
    gemv_int4_kernel[grid](
        padded,
        weight.codes,
        weight.scales.view(torch.int32),
        None if is_split else bias,
        parts,
        operands.num_rows,
        operands.num_columns,
        operands.num_blocks,
        padded.stride(0),
        BITS=operands.stored_bits,
        GROUP_SIZE=weight.group_size,
        SCALES_ARE_BF16=weight.scales.dtype == torch.bfloat16,
        TILE_ROWS=tile.num_rows,
        TILE_COLUMNS=tile.num_columns,
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=FEW_ROWS_MAX_REGISTERS.get((operands.arch, weight.group_size, tile.num_rows)),
        enable_fp_fusion=FUSE_FLOATS,
    )
    if is_split:
        _sum_parts(parts, bias, out, operands)
    return out


def _sum_parts(parts: Tensor, bias: Tensor | None, out: Tensor, operands: LinearOperands) -> None:
    grid = (operands.num_rows, triton.cdiv(operands.num_columns, SUM_COLUMNS))
    sum_parts_kernel[grid](
        parts,
        bias,
        out,
        operands.num_rows,
        operands.num_columns,
        len(parts),
        TILE_COLUMNS=SUM_COLUMNS,
        num_warps=COPY_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
