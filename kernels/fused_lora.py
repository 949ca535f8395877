"""Low-rank adapters in two launches for all that a step's rows go through: down to the rank, and up again.

Legend: T = tokens, A = rows of an adapter's, L = adapters, R = rank, N = out, K = in features, P = parts, S = splits.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSE_FLOATS, IS_INTERPRETED, check_half, launch_arch, operand, rounded
from kernels.lora import LORA_ROWS, RANK_MULTIPLE, AdapterRows, LoraStack, check_operands
from kernels.tiles import DENSE_BLOCK, LORA_COLUMNS, LORA_WARPS, lora_down_columns, lora_splits


@triton.jit(do_not_specialize=["num_rows", "blocks_per_split"])
def lora_down_kernel(
    x_ptr: tl.tensor,
    down_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_adapters_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    blocks_per_split: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (column tile, row tile, split): parts float32 [S, A, P * R] of rows in order, for down [L, P * R, K].

    blocks_per_split: how many BLOCKs of K a split has.
    """
    tile = tl.program_id(1)
    split = tl.program_id(2)
    first_row = tl.load(tile_rows_ptr + 2 * tile)
    last_row = tl.load(tile_rows_ptr + 2 * tile + 1)
    # 64-bit: all adapters together hold more than 2**31 weights
    adapter = tl.load(tile_adapters_ptr + tile).to(tl.int64)
    rows = first_row + tl.arange(0, TILE_ROWS)
    places = tl.load(order_ptr + tl.minimum(rows, last_row - 1)).to(tl.int64)
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inputs = tl.arange(0, BLOCK)
    # columns past the last repeat it, and are not stored
    down_ptr += adapter * num_columns * num_inputs
    down_ptrs = down_ptr + tl.minimum(columns, num_columns - 1)[:, None] * num_inputs + inputs[None, :]
    x_ptrs = x_ptr + (places * x_stride)[None, :] + inputs[:, None]
    total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(num_inputs, BLOCK))
    for block in range(first_block, last_block):
        first_input = block * BLOCK
        inside = first_input + inputs < num_inputs
        weights = tl.load(down_ptrs + first_input, mask=inside[None, :], other=0.0)
        x = tl.load(x_ptrs + first_input, mask=inside[:, None], other=0.0)
        total = tl.dot(operand(weights, INTERPRETED), operand(x, INTERPRETED), total)
    offsets = (split * num_rows + rows)[None, :] * num_columns + columns[:, None]
    tl.store(parts_ptr + offsets, total, mask=(rows < last_row)[None, :] & (columns < num_columns)[:, None])


@triton.jit(do_not_specialize=["num_rows", "num_splits", "first_end", "second_end", "num_columns"])
def lora_up_kernel(
    parts_ptr: tl.tensor,
    up_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_adapters_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_splits: tl.tensor,
    num_hidden: tl.tensor,
    rank: tl.tensor,
    first_end: tl.tensor,
    second_end: tl.tensor,
    num_columns: tl.tensor,
    out_stride: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (column tile, row tile) adds to out [T, N] the parts [S, A, P * R], summed in order, times up [L, N, R].

    Columns are of the part before first_end, before second_end or before num_columns, and tiled part by part; rank is a
    multiple of BLOCK, and num_hidden is P * R.
    """
    tile = tl.program_id(1)
    first_row = tl.load(tile_rows_ptr + 2 * tile)
    last_row = tl.load(tile_rows_ptr + 2 * tile + 1)
    adapter = tl.load(tile_adapters_ptr + tile).to(tl.int64)
    column_tile = tl.program_id(0)
    second_tile = tl.cdiv(first_end, TILE_COLUMNS)
    third_tile = second_tile + tl.cdiv(second_end - first_end, TILE_COLUMNS)
    part = (column_tile >= second_tile).to(tl.int32) + (column_tile >= third_tile).to(tl.int32)
    start = tl.where(part == 0, 0, tl.where(part == 1, first_end, second_end))
    stop = tl.where(part == 0, first_end, tl.where(part == 1, second_end, num_columns))
    tile_in_part = column_tile - tl.where(part == 0, 0, tl.where(part == 1, second_tile, third_tile))
    columns = start + tile_in_part * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    rows = first_row + tl.arange(0, TILE_ROWS)
    ranks = tl.arange(0, BLOCK)
    up_ptrs = up_ptr + (adapter * num_columns + tl.minimum(columns, stop - 1))[:, None] * rank + ranks[None, :]
    parts_ptrs = parts_ptr + tl.minimum(rows, last_row - 1)[None, :] * num_hidden + part * rank + ranks[:, None]
    total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
    for first_rank in range(0, rank, BLOCK):
        hidden = tl.zeros((BLOCK, TILE_ROWS), tl.float32)
        for split in range(num_splits):
            hidden += tl.load(parts_ptrs + split * num_rows * num_hidden + first_rank)
        weights = tl.load(up_ptrs + first_rank)
        hidden = rounded(hidden, up_ptr.dtype.element_ty)
        total = tl.dot(operand(weights, INTERPRETED), operand(hidden, INTERPRETED), total)
    places = tl.load(order_ptr + tl.minimum(rows, last_row - 1)).to(tl.int64)
    out_ptrs = out_ptr + (places * out_stride)[None, :] + columns[:, None]
    inside = (rows < last_row)[None, :] & (columns < stop)[:, None]
    total += tl.load(out_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptrs, rounded(total, out_ptr.dtype.element_ty), mask=inside)


def add_lora(out: Tensor, x: Tensor, stack: LoraStack, rows: AdapterRows) -> None:
    """Add to rows of out [T, N] what their adapters make of those of x [T, K]; the others are not touched.

    All fp16 or bf16. The product with down is summed in float32 in an order that K alone decides, and rounded once;
    a row's bits depend on no other row. Raises ValueError for operands that do not fit.
    """
    check_operands(out, x, stack)
    check_half("x", x)
    for name, tensor in (("x", x), ("out", out)):
        if tensor.stride(1) != 1:
            raise ValueError(f"the columns of {name} must be neighbours in memory; they are {tensor.stride(1)} apart")
    if not stack.down.is_contiguous() or not stack.up.is_contiguous():
        raise ValueError("the adapters' weights must be contiguous")
    launch_arch({"x": x, "out": out, "down": stack.down, "up": stack.up, "order": rows.order})
    if len(rows.order):
        _multiply_up(out, _multiply_down(x, stack, rows), stack, rows)


def _multiply_down(x: Tensor, stack: LoraStack, rows: AdapterRows) -> Tensor:
    """Of the rows in order, the parts float32 [S, A, P * R]."""
    num_rows = len(rows.order)
    _, num_hidden, num_inputs = stack.down.shape
    num_splits = lora_splits(num_inputs)
    parts = torch.empty((num_splits, num_rows, num_hidden), dtype=torch.float32, device=x.device)
    down_columns = lora_down_columns(num_hidden)
    lora_down_kernel[(triton.cdiv(num_hidden, down_columns), len(rows.tile_adapters), num_splits)](
        x,
        stack.down,
        rows.order,
        rows.tile_adapters,
        rows.tile_rows,
        parts,
        num_rows,
        num_hidden,
        num_inputs,
        x.stride(0),
        triton.cdiv(triton.cdiv(num_inputs, DENSE_BLOCK), num_splits),
        TILE_ROWS=LORA_ROWS,
        TILE_COLUMNS=down_columns,
        BLOCK=DENSE_BLOCK,
        INTERPRETED=IS_INTERPRETED,
        num_warps=LORA_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return parts


def _multiply_up(out: Tensor, parts: Tensor, stack: LoraStack, rows: AdapterRows) -> None:
    num_splits, num_rows, num_hidden = parts.shape
    num_tiles = len(rows.tile_adapters)
    ends = [sum(stack.part_widths[: part + 1]) for part in range(len(stack.part_widths))]
    # a part that there is not ends where the last one does
    first_end, second_end = (*ends, ends[-1])[:2]
    lora_up_kernel[(sum(triton.cdiv(width, LORA_COLUMNS) for width in stack.part_widths), num_tiles)](
        parts,
        stack.up,
        rows.order,
        rows.tile_adapters,
        rows.tile_rows,
        out,
        num_rows,
        num_splits,
        num_hidden,
        stack.rank,
        first_end,
        second_end,
        out.shape[1],
        out.stride(0),
        TILE_ROWS=LORA_ROWS,
        TILE_COLUMNS=LORA_COLUMNS,
        BLOCK=RANK_MULTIPLE,
        INTERPRETED=IS_INTERPRETED,
        num_warps=LORA_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
