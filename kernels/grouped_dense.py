"""Dense linear layers of a mixture of experts: `grouped_int4`'s one launch, over weights that are not quantized.

Legend: T = tokens, C = choices of a token (top-k), A = T * C assignments, E = experts, N = out, K = in features.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts import SortedRows
from kernels.grouped_int4 import check_grouped
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED, launch_arch, operand
from kernels.tiles import DENSE_BLOCK, grouped_dense_tile


@triton.jit(do_not_specialize=["x_repeats"])
def grouped_dense_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_experts_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    x_repeats: tl.tensor,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (column tile, row tile) as in `grouped_int4_kernel`; weight [E, N, K] in the dtype of x.

    All of K is summed by one program, in order: a row's bits depend on no other row.
    """
    tile = tl.program_id(1)
    first_row = tl.load(tile_rows_ptr + 2 * tile)
    last_row = tl.load(tile_rows_ptr + 2 * tile + 1)
    if first_row < last_row:
        # 64-bit: all experts together hold more than 2**31 weights, all assignments more than 2**31 activations
        expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
        rows = first_row + tl.arange(0, TILE_ROWS)
        assignments = tl.load(order_ptr + tl.minimum(rows, last_row - 1)).to(tl.int64)
        columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        inputs = tl.arange(0, BLOCK)
        # columns past N repeat the last, and are not stored
        weight_ptr += expert * num_columns * num_inputs
        weight_ptrs = weight_ptr + tl.minimum(columns, num_columns - 1)[:, None] * num_inputs + inputs[None, :]
        x_ptrs = x_ptr + (assignments // x_repeats * x_stride)[None, :] + inputs[:, None]
        total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
        for first_input in range(0, num_inputs, BLOCK):
            inside = first_input + inputs < num_inputs
            weights = tl.load(weight_ptrs + first_input, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptrs + first_input, mask=inside[:, None], other=0.0)
            total = tl.dot(operand(weights, INTERPRETED), operand(x, INTERPRETED), total)
        offsets = assignments[None, :] * num_columns + columns[:, None]
        stored = (rows < last_row)[None, :] & (columns < num_columns)[:, None]
        tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=stored)


def grouped_dense(x: Tensor, weight: Tensor, plan: SortedRows) -> Tensor:
    """Each assignment's row of x times its expert's weight [E, N, K], transposed: [A, N], as `grouped_int4`.

    x and weight fp16 or bf16. Raises ValueError for operands that do not fit.
    """
    num_experts, num_columns, num_inputs = weight.shape
    check_grouped(x, (num_experts, num_columns, num_inputs), plan)
    if weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(f"experts must be contiguous and in x's {x.dtype}, not {weight.dtype}")
    arch = launch_arch({"x": x, "weight": weight, "order": plan.order})
    num_assignments = len(plan.order)
    out = torch.empty((num_assignments, num_columns), dtype=x.dtype, device=x.device)
    if num_assignments == 0:
        return out
    tile = grouped_dense_tile(arch, plan.max_tile_rows)
    grouped_dense_kernel[(triton.cdiv(num_columns, tile.num_columns), len(plan.tile_experts))](
        x,
        weight,
        plan.order,
        plan.tile_experts,
        plan.tile_rows,
        out,
        num_columns,
        num_inputs,
        x.stride(0),
        num_assignments // x.shape[0],
        TILE_ROWS=tile.num_rows,
        TILE_COLUMNS=tile.num_columns,
        BLOCK=DENSE_BLOCK,
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return out
