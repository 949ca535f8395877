"""The gates of an MLP: silu or GELU of the gate times the up projection. Triton kernels and their checked wrappers.

Legend: M = rows, K = columns of the gate and of the up projection, which lie side by side in one product [M, 2K].
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSE_FLOATS, check_half, launch_arch, rounded
from kernels.tiles import COPY_WARPS, GATE_COLUMNS

# sqrt(2 / pi), of GELU's tanh approximation
GELU_SLOPE = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def load_gate_and_up(
    gate_up_ptr: tl.tensor, gate_up_stride: tl.tensor, num_columns: tl.tensor, TILE_COLUMNS: tl.constexpr
) -> tl.tuple:
    """The program's (row, column tile) of gate and up as float32, and the offset and mask of its result [M, K]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < num_columns
    row_ptr = gate_up_ptr + row * gate_up_stride + columns
    gate = tl.load(row_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row_ptr + num_columns, mask=inside, other=0.0).to(tl.float32)
    return gate, up, row * num_columns + columns, inside


@triton.jit
def silu_gate_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    num_columns: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Program (row, column tile): out [M, K] = silu(gate) * up; rows of gate_up [M, 2K] are gate_up_stride apart."""
    gate, up, offsets, inside = load_gate_and_up(gate_up_ptr, gate_up_stride, num_columns, TILE_COLUMNS)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + offsets, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_gate_kernel(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    gate_up_stride: tl.tensor,
    num_columns: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> None:
    """Program (row, column tile): out [M, K] = gelu(gate) * up, as `silu_gate_kernel`."""
    gate, up, offsets, inside = load_gate_and_up(gate_up_ptr, gate_up_stride, num_columns, TILE_COLUMNS)
    # (1 + tanh(y)) / 2 is the logistic function of 2y
    doubled = 2.0 * GELU_SLOPE * (gate + GELU_CUBIC * gate * gate * gate)
    out = gate / (1.0 + tl.exp(-doubled)) * up
    tl.store(out_ptr + offsets, rounded(out, out_ptr.dtype.element_ty), mask=inside)


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns times the second half: fp16 or bf16 [M, 2K] to [M, K].

    Computed in float32 and rounded once. Raises ValueError for an operand that does not fit.
    """
    out = _empty_out(gate_up)
    num_rows, num_columns = out.shape
    if num_rows > 0:
        silu_gate_kernel[(num_rows, triton.cdiv(num_columns, GATE_COLUMNS))](
            gate_up,
            out,
            gate_up.stride(0),
            num_columns,
            TILE_COLUMNS=GATE_COLUMNS,
            num_warps=COPY_WARPS,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return out


def gelu_gate(gate_up: Tensor) -> Tensor:
    """As `silu_gate`, with GELU in its tanh approximation."""
    out = _empty_out(gate_up)
    num_rows, num_columns = out.shape
    if num_rows > 0:
        gelu_gate_kernel[(num_rows, triton.cdiv(num_columns, GATE_COLUMNS))](
            gate_up,
            out,
            gate_up.stride(0),
            num_columns,
            TILE_COLUMNS=GATE_COLUMNS,
            num_warps=COPY_WARPS,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return out


def _empty_out(gate_up: Tensor) -> Tensor:
    check_half("gate_up", gate_up)
    if gate_up.ndim != 2 or gate_up.shape[1] == 0 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [M, 2K], the gate's columns and as many of up, not {list(gate_up.shape)}")
    if gate_up.stride(1) != 1:
        raise ValueError(f"the columns of gate_up must be neighbours in memory, not {gate_up.stride(1)} elements apart")
    launch_arch({"gate_up": gate_up})
    return torch.empty((len(gate_up), gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
