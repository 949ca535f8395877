"""The check that both INT4 wrappers make before they launch: shapes, dtypes, layout, device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import check_half, launch_arch
from kernels.layout import NIBBLE_BITS, PLANAR_BLOCKS, PackedWeight, WeightLayout


@dataclass(frozen=True)
class LinearOperands:
    """x [num_rows, num_inputs] against a weight [num_columns, num_inputs], on architecture `arch`.

    num_blocks: of K, with its padding. stored_bits: a code's place in a word, 4 or 8.
    """

    arch: int
    num_rows: int
    num_columns: int
    num_inputs: int
    num_blocks: int
    stored_bits: int


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
    operands = {"x": x, "codes": weight.codes, "scales": weight.scales}
    if bias is not None:
        if bias.shape != (num_columns,):
            raise ValueError(f"bias must be [{num_columns}], not {list(bias.shape)}")
        if bias.stride(0) != 1:
            raise ValueError(f"bias must be contiguous; its elements are {bias.stride(0)} apart")
        operands["bias"] = bias
    return LinearOperands(
        arch=launch_arch(operands),
        num_rows=x.shape[0],
        num_columns=num_columns,
        num_inputs=num_inputs,
        num_blocks=weight.codes.shape[1],
        stored_bits=4 if weight.bits in NIBBLE_BITS else 8,
    )


def whole_blocks(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [M, K] with zeros up to whole blocks of the weight's K; x itself where K is whole, as in nearly every model.

    The weight is padded with weights of 0, but 0 times what lies behind a row of x may be NaN.
    """
    padding = weight.codes.shape[1] * PLANAR_BLOCKS[weight.bits] - x.shape[1]
    return torch.nn.functional.pad(x, (0, padding)) if padding else x
