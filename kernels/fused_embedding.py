"""The rows of an embedding table that a step's tokens name: Triton kernels and their checked wrappers.

Legend: T = tokens of the step, V = rows of the table, K = width of a row.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSE_FLOATS, check_half, launch_arch, rounded
from kernels.tiles import COPY_WARPS, GATHERED_COLUMNS


@triton.jit(do_not_specialize=["num_table_rows"])
def gather_rows_kernel(
    token_ids_ptr: tl.tensor,
    table_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    table_stride: tl.tensor,
    num_table_rows: tl.tensor,
    num_columns: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Program (token, column tile): out [T, K] = row token_ids[token] of the table, times its scale if it has one.

    table [V, K] with rows table_stride apart; scales [V] or None. An id outside of 0 .. V gives a row of NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    token_id = tl.load(token_ids_ptr + token)
    is_row = (token_id >= 0) & (token_id < num_table_rows)
    row = tl.where(is_row, token_id, 0)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < num_columns
    values = tl.load(table_ptr + row * table_stride + columns, mask=inside, other=0).to(tl.float32)
    if scales_ptr is not None:
        values *= tl.load(scales_ptr + row).to(tl.float32)
    values = tl.where(is_row, values, float("nan"))
    tl.store(out_ptr + token * num_columns + columns, rounded(values, out_ptr.dtype.element_ty), mask=inside)


def gather_rows(token_ids: Tensor, table: Tensor) -> Tensor:
    """Rows token_ids int64 [T] of a table [V, K] fp16 or bf16: [T, K]. Raises ValueError for operands that do not fit.

    An id outside of the table, such as the -1 that stands for a token that could not be chosen, gives NaN.
    """
    check_half("the table", table)
    return _gather(token_ids, table, None, table.dtype)


def gather_int8_rows(token_ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `gather_rows`, from codes int8 [V, K] with a scale per row [V] fp16 or bf16, whose dtype the result has."""
    check_half("scales", scales)
    if codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8, not {codes.dtype}")
    if scales.shape != codes.shape[:1] or scales.stride(0) != 1:
        raise ValueError(f"scales must be contiguous [{len(codes)}], one per row, not {list(scales.shape)}")
    return _gather(token_ids, codes, scales, scales.dtype)


def _gather(token_ids: Tensor, table: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    if token_ids.dtype != torch.int64 or token_ids.ndim != 1 or not token_ids.is_contiguous():
        raise ValueError(f"token_ids must be contiguous int64 [T], not {token_ids.dtype} {list(token_ids.shape)}")
    if table.ndim != 2 or len(table) == 0 or table.stride(1) != 1:
        raise ValueError(f"the table must be [V, K] with contiguous rows, at least one, not {list(table.shape)}")
    launch_arch({"token_ids": token_ids, "table": table, **({} if scales is None else {"scales": scales})})
    num_columns = table.shape[1]
    out = torch.empty((len(token_ids), num_columns), dtype=dtype, device=table.device)
    if len(token_ids) == 0:
        return out
    gather_rows_kernel[(len(token_ids), triton.cdiv(num_columns, GATHERED_COLUMNS))](
        token_ids,
        table,
        scales,
        out,
        table.stride(0),
        len(table),
        num_columns,
        TILE_COLUMNS=GATHERED_COLUMNS,
        num_warps=COPY_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return out
