"""INT4 linear layers of a mixture of experts: one launch for all experts, over rows sorted by expert.

Legend: T = tokens, C = choices of a token (top-k), A = T * C assignments, E = experts, N = out, K = in features.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts import PackedExperts, SortedRows
from kernels.int4_tile import multiply_blocks
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED, check_half, launch_arch
from kernels.layout import PLANAR_BLOCKS
from kernels.tiles import COPY_WARPS, MAX_REGISTERS, SUM_COLUMNS, grouped_tile, num_splits


@triton.jit(do_not_specialize=["num_blocks", "num_splits", "x_repeats"])
def grouped_int4_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    order_ptr: tl.tensor,
    tile_experts_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    num_blocks: tl.tensor,
    x_stride: tl.tensor,
    words_stride: tl.tensor,
    pairs_stride: tl.tensor,
    num_splits: tl.tensor,
    x_repeats: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES_ARE_BF16: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (column tile, row tile) multiplies assignments of one expert; row a of out [A, N] is assignment a's.

    order int32 [A]: assignments by expert. Row tile i has order[tile_rows[i, 0]:tile_rows[i, 1]] at most TILE_ROWS of
    them, of expert tile_experts[i]; a tile of no rows ends at once. Assignment a reads row a // x_repeats of x.
    words_stride, pairs_stride: from expert to expert. K is summed in the order of the kernels for one weight.
    """
    tile = tl.program_id(1)
    first_row = tl.load(tile_rows_ptr + 2 * tile)
    last_row = tl.load(tile_rows_ptr + 2 * tile + 1)
    if first_row < last_row:
        # 64-bit: all experts together hold more than 2**31 words, all assignments more than 2**31 activations
        expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
        rows = first_row + tl.arange(0, TILE_ROWS)
        assignments = tl.load(order_ptr + tl.minimum(rows, last_row - 1)).to(tl.int64)
        first_column = tl.program_id(0) * TILE_COLUMNS
        blocks_per_split = tl.cdiv(num_blocks, num_splits)
        total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
        for split in range(num_splits):
            first_block = split * blocks_per_split
            total += multiply_blocks(
                x_ptr,
                words_ptr + expert * words_stride,
                pairs_ptr + expert * pairs_stride,
                assignments // x_repeats * x_stride,
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
        offsets = assignments[None, :] * num_columns + columns[:, None]
        inside = (rows < last_row)[None, :] & (columns < num_columns)[:, None]
        tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_choices"])
def sum_choices_kernel(
    choices_ptr: tl.tensor,
    router_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_columns: tl.tensor,
    num_choices: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Program (token, column tile) adds choices [T, C, N] times router weights float32 [T, C], from first to last."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < num_columns
    total = tl.zeros((TILE_COLUMNS,), tl.float32)
    for choice in range(num_choices):
        row = token * num_choices + choice
        values = tl.load(choices_ptr + row * num_columns + columns, mask=inside, other=0.0).to(tl.float32)
        total = tl.fma(values, tl.broadcast_to(tl.load(router_ptr + row), values.shape), total)
    tl.store(out_ptr + token * num_columns + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


def grouped_int4(x: Tensor, weight: PackedExperts, plan: SortedRows) -> Tensor:
    """Each assignment's row of x times its expert's weight, transposed: [A, N] in x's dtype, in assignments' order.

    x fp16 or bf16 [T, K], where the C assignments of a token share its row, or [A, K]. A row's bits are those that
    `gemm_int4` gives for its expert's weight alone. Raises ValueError for operands that do not fit.
    """
    check_grouped(x, (weight.num_experts, *weight.shape), plan)
    arch = launch_arch({"x": x, "codes": weight.codes, "scales": weight.scales, "order": plan.order})
    num_assignments, num_columns = len(plan.order), weight.shape[0]
    num_blocks = weight.codes.shape[2]
    out = torch.empty((num_assignments, num_columns), dtype=x.dtype, device=x.device)
    if num_assignments == 0:
        return out
    tile = grouped_tile(arch, plan.max_tile_rows, weight.group_size)
    padding = num_blocks * PLANAR_BLOCKS[weight.bits] - x.shape[1]
    padded = torch.nn.functional.pad(x, (0, padding)) if padding else x
    grid = (triton.cdiv(num_columns, tile.num_columns), len(plan.tile_experts))
    grouped_int4_kernel[grid](
        padded,
        weight.codes,
        weight.scales.view(torch.int32),
        plan.order,
        plan.tile_experts,
        plan.tile_rows,
        out,
        num_columns,
        num_blocks,
        padded.stride(0),
        weight.codes.stride(0),
        # in pairs, of two halves each
        weight.scales.stride(0) // 2,
        num_splits(arch, num_columns, num_blocks),
        num_assignments // x.shape[0],
        BITS=8 if weight.bits == 8 else 4,
        GROUP_SIZE=weight.group_size,
        SCALES_ARE_BF16=weight.scales.dtype == torch.bfloat16,
        TILE_ROWS=tile.num_rows,
        TILE_COLUMNS=tile.num_columns,
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=MAX_REGISTERS.get(arch),
        enable_fp_fusion=FUSE_FLOATS,
    )
    return out


def check_grouped(x: Tensor, shape: tuple[int, int, int], plan: SortedRows) -> None:
    """Raises ValueError, saying what would be right, for operands that do not fit.

    shape: [E, N, K] of the experts.
    """
    num_experts, num_outputs, num_inputs = shape
    if x.ndim != 2 or x.shape[1] != num_inputs:
        raise ValueError(f"x must be [T, {num_inputs}] for experts of {[num_outputs, num_inputs]}, not {list(x.shape)}")
    check_half("x", x)
    if x.stride(1) != 1:
        raise ValueError(f"the columns of x must be neighbours in memory; they are {x.stride(1)} elements apart")
    if plan.num_experts != num_experts:
        raise ValueError(f"rows are routed to {plan.num_experts} experts, and there are {num_experts}")
    num_assignments = len(plan.order)
    if num_assignments and (not len(x) or num_assignments % len(x)):
        raise ValueError(f"{num_assignments} assignments do not fall evenly on {len(x)} rows of x")


def sum_choices(choices: Tensor, router: Tensor) -> Tensor:
    """choices [T * C, N] times router weights float32 [T, C], summed over a token's choices in order: [T, N].

    Summed in float32, in the dtype of the choices. Raises ValueError for shapes that do not fit.
    """
    num_tokens, num_choices = router.shape
    if choices.ndim != 2 or choices.shape[0] != num_tokens * num_choices or not choices.is_contiguous():
        raise ValueError(f"choices must be a contiguous [{num_tokens * num_choices}, N], not {list(choices.shape)}")
    if router.dtype != torch.float32 or not router.is_contiguous():
        raise ValueError(f"router weights must be contiguous float32, not {router.dtype}")
    out = torch.empty((num_tokens, choices.shape[1]), dtype=choices.dtype, device=choices.device)
    if out.numel():
        grid = (num_tokens, triton.cdiv(choices.shape[1], SUM_COLUMNS))
        sum_choices_kernel[grid](
            choices,
            router,
            out,
            choices.shape[1],
            num_choices,
            TILE_COLUMNS=SUM_COLUMNS,
            num_warps=COPY_WARPS,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return out
