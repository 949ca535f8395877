"""The check that both INT4 wrappers make before they launch: shapes, dtypes, layout, device."""

from dataclasses import dataclass

from torch import Tensor

from kernels.launch import check_half, launch_arch
from kernels.layout import PackedWeight, WeightLayout


@dataclass(frozen=True)
class LinearOperands:
    """x [num_rows, num_inputs] against a weight [num_columns, num_inputs], on architecture `arch`."""

    arch: int
    num_rows: int
    num_columns: int
    num_inputs: int


def check_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> LinearOperands:
    """Raises ValueError, saying what would be right, unless the INT4 kernels can compute x W^T + bias."""
    if weight.layout is not WeightLayout.PLANAR:
        raise ValueError(f"the INT4 kernels read the planar layout, not {weight.layout.value}: see repack_planar")
    num_columns, num_inputs = weight.shape
    if x.ndim != 2 or x.shape[1] != num_inputs:
        raise ValueError(f"x must be [M, {num_inputs}] for a weight of {list(weight.shape)}, not {list(x.shape)}")
    check_half("x", x)
    if x.stride(1) != 1:
        raise ValueError(f"the columns of x must be neighbours in memory; they are {x.stride(1)} elements apart")
    operands = {"x": x, "codes": weight.codes, "scales": weight.scales, "zeros": weight.zeros}
    if bias is not None:
        if bias.shape != (num_columns,):
            raise ValueError(f"bias must be [{num_columns}], not {list(bias.shape)}")
        if bias.stride(0) != 1:
            raise ValueError(f"bias must be contiguous; its elements are {bias.stride(0)} apart")
        operands["bias"] = bias
    return LinearOperands(
        arch=launch_arch(operands), num_rows=x.shape[0], num_columns=num_columns, num_inputs=num_inputs
    )
