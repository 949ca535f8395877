"""Picks the kernel for an operation from (device, rows) in plain functions. An absent kernel is an error."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels import cpu, cpu_attention
from kernels.cpu_attention import CpuAttentionPlan
from kernels.layout import (
    NIBBLE_BITS,
    PackedWeight,
    WeightLayout,
    planar_on_device,
    repack_int4_cpu,
    repack_planar,
)
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.tiles import is_dense, nearest_architecture

# up to here the GPU kernel for few rows (decode) is used, above the one for many (prefill)
MAX_GEMV_ROWS = 64

# on a GPU the batch itself is the plan: its kernels read block tables
AttentionPlan = AttentionBatch | CpuAttentionPlan


def runtime_layout(device: torch.device) -> WeightLayout:
    """The layout that the device's kernels read. Raises ValueError for a device without kernels."""
    if device.type == "cpu":
        return WeightLayout.INT4_CPU
    if device.type == "cuda":
        return WeightLayout.PLANAR
    raise ValueError(f"there are no kernels for the device {device}; use cpu or cuda")


def has_packed_kernel(weight: PackedWeight, device: torch.device) -> bool:
    """Whether the device multiplies with the weight as it is packed; on a CPU one of 8 bits is to be dequantized."""
    return weight.bits in NIBBLE_BITS or runtime_layout(device) is WeightLayout.PLANAR


def prepare_weight(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """A ROW_MAJOR weight, in the layout that the device's kernels read, on the device.

    Raises ValueError for a device without kernels, or bits or a group size that its kernels do not read.
    """
    if runtime_layout(device) is WeightLayout.INT4_CPU:
        return repack_int4_cpu(weight)
    return planar_on_device(repack_planar(weight), device)


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times a weight [N, K] in the device's layout, transposed: [M, N] in x's dtype."""
    if x.device.type == "cpu":
        return cpu.quantized_linear(x, weight, bias)
    _require_cuda(x.device)
    if x.shape[0] <= MAX_GEMV_ROWS:
        from kernels.gemv_int4 import gemv_int4

        return gemv_int4(x, weight, bias)
    if is_dense(nearest_architecture(*torch.cuda.get_device_capability(x.device)), x.shape[0]):
        from kernels.dequantize_int4 import dequantize_int4

        return torch.nn.functional.linear(x, dequantize_int4(weight, x.dtype), bias)
    from kernels.gemm_int4 import gemm_int4

    return gemm_int4(x, weight, bias)


def max_rows_together(device: torch.device) -> int:
    """How many rows a linear layer takes with no row's result depending on the others."""
    return cpu.cpu_traits().max_int4_op_rows if device.type == "cpu" else MAX_GEMV_ROWS


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float32, in x's dtype."""
    if x.device.type == "cpu":
        return cpu.rms_norm(x, weight, epsilon)
    _require_cuda(x.device)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def plan_attention(batch: AttentionBatch, layer: PagedLayer, windows: Iterable[int | None]) -> AttentionPlan:
    """What all layers of a step share: caches of the shape of `layer`, sliding windows among `windows`."""
    if layer.keys.device.type == "cpu":
        return cpu_attention.plan_attention(batch, layer, windows)
    _require_cuda(layer.keys.device)
    return batch


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, plan: AttentionPlan) -> None:
    """Write the step's keys and values [T, H_kv, D] into the cache."""
    if isinstance(plan, CpuAttentionPlan):
        cpu_attention.write_kv(keys, values, layer, plan)
        return
    from kernels import paged_attention

    paged_attention.write_kv(keys, values, layer, plan.slot_mapping)


def attention(
    query: Tensor, layer: PagedLayer, plan: AttentionPlan, *, softmax_scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's cached blocks: [T, H, D] in the query's dtype."""
    if isinstance(plan, CpuAttentionPlan):
        return cpu_attention.paged_attention(
            query, layer, plan, softmax_scale=softmax_scale, sliding_window=sliding_window
        )
    from kernels.paged_attention import paged_attention

    return paged_attention(query, layer, plan, softmax_scale=softmax_scale, sliding_window=sliding_window)


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"there are no kernels for the device {device}; use cpu or cuda")
