"""A plain Triton kernel for INT4 weights, to compare machine code with: shift, mask, convert, scale, multiply.

It reads the GPTQ arrangement, int32 [K / 8, N], as public Triton kernels do, and is written like them.
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def plain_int4_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_inputs: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
) -> None:
    """Program (column tile) writes out [M, N] = x [M, K] times (code - zero) * scale, zeros as numbers [K / g, N]."""
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    rows = tl.arange(0, TILE_ROWS)
    inputs = tl.arange(0, TILE_INPUTS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    total = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for first in range(0, num_inputs, TILE_INPUTS):
        k = first + inputs
        x = tl.load(x_ptr + rows[:, None] * num_inputs + k[None, :], mask=(rows < num_rows)[:, None], other=0.0)
        words = tl.load(words_ptr + (k // 8)[:, None] * num_columns + columns[None, :])
        codes = (words >> (k % 8 * 4)[:, None]) & 0xF
        group_offsets = first // GROUP_SIZE * num_columns + columns
        scales = tl.load(scales_ptr + group_offsets)[None, :]
        zeros = tl.load(zeros_ptr + group_offsets)[None, :]
        weights = (codes.to(dtype) - zeros) * scales
        total = tl.dot(x, weights, total)
    inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    tl.store(out_ptr + rows[:, None] * num_columns + columns[None, :], total.to(dtype), mask=inside)
