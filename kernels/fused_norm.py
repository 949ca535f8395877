"""RMS norm, alone or together with the residual sum before it: Triton kernel and its checked wrappers.

One program normalizes one row and holds it in registers, so a row's bits depend on nothing but the row.
Legend: K = width of a row.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSE_FLOATS, check_half, launch_arch, rounded
from kernels.tiles import MAX_ROW_WIDTH, row_warps


@triton.jit
def rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    normed_ptr: tl.tensor,
    total_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    epsilon: tl.tensor,
    WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """Program (row): normed [M, WIDTH] = rms norm of x, or of x + residual, which then is written to total [M, WIDTH].

    x and residual have rows x_stride and residual_stride apart; residual and total are both None or neither is.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, TILE_WIDTH)
    inside = columns < WIDTH
    values = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0)
        total = rounded(values + residual.to(tl.float32), total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * WIDTH + columns, total, mask=inside)
        values = total.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(values * values) / WIDTH + epsilon)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = values * scale * weight
    tl.store(normed_ptr + row * WIDTH + columns, rounded(normed, normed_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [M, K] / rms(x) * weight [K] per row, computed in float32, in x's dtype (fp16 or bf16).

    A model whose norm multiplies by 1 + w passes that sum. Raises ValueError for operands that do not fit.
    """
    _check_norm(weight, {"x": x})
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x) == 0:
        return normed
    width = x.shape[1]
    rms_norm_kernel[(len(x),)](
        x,
        None,
        weight,
        normed,
        None,
        x.stride(0),
        0,
        epsilon,
        WIDTH=width,
        TILE_WIDTH=triton.next_power_of_2(width),
        num_warps=row_warps(width),
        enable_fp_fusion=FUSE_FLOATS,
    )
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The rms norm of x + residual, both [M, K], and that sum, rounded to their dtype before it is normalized.

    Raises ValueError for operands that do not fit.
    """
    _check_norm(weight, {"x": x, "residual": residual})
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x) == 0:
        return normed, total
    width = x.shape[1]
    rms_norm_kernel[(len(x),)](
        x,
        residual,
        weight,
        normed,
        total,
        x.stride(0),
        residual.stride(0),
        epsilon,
        WIDTH=width,
        TILE_WIDTH=triton.next_power_of_2(width),
        num_warps=row_warps(width),
        enable_fp_fusion=FUSE_FLOATS,
    )
    return normed, total


def _check_norm(weight: Tensor, rows: dict[str, Tensor]) -> None:
    x = rows["x"]
    check_half("x", x)
    if x.ndim != 2 or not 1 <= x.shape[1] <= MAX_ROW_WIDTH:
        raise ValueError(f"x must be [M, K] with K from 1 to {MAX_ROW_WIDTH}, not {list(x.shape)}")
    for name, tensor in rows.items():
        if tensor.shape != x.shape or tensor.dtype != x.dtype:
            raise ValueError(
                f"{name} must be {x.dtype} {list(x.shape)} as x is, not {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.stride(1) != 1:
            raise ValueError(f"the columns of {name} must be neighbours in memory; they are {tensor.stride(1)} apart")
    if weight.shape != x.shape[1:] or weight.stride(0) != 1:
        raise ValueError(f"weight must be contiguous [{x.shape[1]}], not {list(weight.shape)}")
    launch_arch({**rows, "weight": weight})
