"""Linear layers and norms on a CPU, at a useful speed: torch's int4 op for few rows, dense products for many.

Legend: M = rows, N = out features, K = in features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import PackedWeight, WeightLayout, unpack_int4_cpu


@dataclass(frozen=True)
class CpuTraits:
    """max_int4_op_rows: above, a weight is dequantized as a whole. dense_dtype: what the dense product then runs in."""

    max_int4_op_rows: int
    dense_dtype: torch.dtype


# from so many elements on torch shares GELU among threads; most elementwise operations from 32,768 on
_SHARED_ELEMENTS = 2**14
# AVX2, measured on one core (AMD Zen, 2 GHz), 3072x576, int4 op against dequantization (4.3 ms) and float32 product:
# 1 row 0.4 against 5.3 ms, 32 rows 7.4 against 9.3, 64 rows 14.5 against 13.0, 128 rows 29 against 19
AVX2_TRAITS = CpuTraits(max_int4_op_rows=64, dense_dtype=torch.float32)
# with bf16 matrix instructions the dense product is about nine times the int4 op's speed, and the dequantization is
# what has to pay off. One core of a Xeon with AMX, 2816x2048: 32 rows 4.2 against 15 to 34 ms, 128 rows 16 against 15
BF16_TRAITS = CpuTraits(max_int4_op_rows=128, dense_dtype=torch.bfloat16)


def cpu_traits() -> CpuTraits:
    """Which row of the table the running CPU belongs to."""
    has_bf16_products = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return BF16_TRAITS if has_bf16_products else AVX2_TRAITS


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times an INT4_CPU weight [N, K] transposed: [M, N] in x's dtype.

    Whatever M, x is rounded to bf16, products are summed in float32 and the sum is rounded to bf16, as torch's int4
    op does it. Up to `max_int4_op_rows` a row's result does not depend on the other rows, to the bit (measured: the op
    sums every row in the same order); above, the order of summation differs, and with bf16 products the dequantized
    weights are rounded to bf16 too. Raises ValueError for another layout or a K that differs.
    """
    if weight.layout is not WeightLayout.INT4_CPU:
        raise ValueError(f"the CPU kernel reads the int4_cpu layout, not {weight.layout.value}")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has K={x.shape[1]}, the weight has K={weight.shape[1]}")
    rounded = x.to(torch.bfloat16)
    traits = cpu_traits()
    if x.shape[0] <= traits.max_int4_op_rows:
        product = multiply_int4(rounded, weight)
    else:
        product = multiply_dense(rounded, weight, traits.dense_dtype)
    output = product[:, : weight.shape[0]].to(x.dtype)
    return output if bias is None else output + bias


def activate(activation: Callable[[Tensor], Tensor], gate: Tensor) -> Tensor:
    """An elementwise function of gate [M, K]; a row's bits do not depend on M.

    torch shares what has many elements among threads, and computes what is left over at the end of a share in
    another way than the rest: shares must not end within a row.
    """
    num_rows = max(1, (_SHARED_ELEMENTS - 1) // max(gate.shape[1], 1))
    return torch.cat([activation(rows) for rows in torch.split(gate, num_rows)])


def multiply_int4(rounded: Tensor, weight: PackedWeight) -> Tensor:
    """bf16 [M, K] by torch's int4 op: bf16 [M, N'], padding included. For few rows."""
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rounded, weight.codes, weight.group_size, weight.scales
    )
    return product


def multiply_dense(rounded: Tensor, weight: PackedWeight, dense_dtype: torch.dtype) -> Tensor:
    """The same by dequantizing the whole weight for one dense product in dense_dtype. For many rows."""
    return (rounded.to(dense_dtype) @ dequantize(weight).to(dense_dtype)).to(torch.bfloat16)


def dequantize(weight: PackedWeight) -> Tensor:
    """An INT4_CPU weight as float32 [K, N'], padding included: what the int4 op multiplies by."""
    scales, offsets = weight.scales.float().unbind(dim=-1)
    groups = unpack_int4_cpu(weight).float().view(-1, weight.group_size, scales.shape[1])
    # (code - 8) * scale + offset; 8 * scale is exact in float32, and nearly always the sum
    return torch.addcmul((offsets - 8 * scales)[:, None], groups, scales[:, None]).flatten(0, 1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float32: half of the small ops torch's own is made of."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scales = norms.square_().mul_(1 / x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * scales).mul_(weight).to(x.dtype)
