"""Picks the kernel for an operation from (device, rows) in plain functions. An absent kernel is an error."""

import torch
from torch import Tensor

from kernels import cpu
from kernels.layout import PackedWeight, WeightLayout, repack_int4_cpu, repack_planar
from kernels.paged_batch import AttentionBatch, PagedLayer

# up to here the GPU kernel for few rows (decode) is used, above the one for many (prefill)
MAX_GEMV_ROWS = 64


def runtime_layout(device: torch.device) -> WeightLayout:
    """The layout that the device's kernels read. Raises ValueError for a device without kernels."""
    if device.type == "cpu":
        return WeightLayout.INT4_CPU
    if device.type == "cuda":
        return WeightLayout.PLANAR
    raise ValueError(f"there are no kernels for the device {device}; use cpu or cuda")


def prepare_weight(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """A ROW_MAJOR weight, in the layout that the device's kernels read, on the device.

    Raises ValueError for a device without kernels, or a group size its kernels do not read.
    """
    if runtime_layout(device) is WeightLayout.INT4_CPU:
        return repack_int4_cpu(weight)
    planar = repack_planar(weight)
    return PackedWeight(
        codes=planar.codes.to(device),
        scales=planar.scales.to(device),
        zeros=planar.zeros.to(device),
        shape=planar.shape,
        bits=planar.bits,
        group_size=planar.group_size,
        layout=planar.layout,
    )


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times a weight [N, K] in the device's layout, transposed: [M, N] in x's dtype."""
    if x.device.type == "cpu":
        return cpu.quantized_linear(x, weight, bias)
    _require_cuda(x.device)
    if x.shape[0] <= MAX_GEMV_ROWS:
        from kernels.gemv_int4 import gemv_int4

        return gemv_int4(x, weight, bias)
    from kernels.gemm_int4 import gemm_int4

    return gemm_int4(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last axis, computed in float32, in x's dtype."""
    if x.device.type == "cpu":
        return cpu.rms_norm(x, weight, epsilon)
    _require_cuda(x.device)
    return torch.nn.functional.rms_norm(x, weight.shape, weight, epsilon)


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Write keys and values [T, H_kv, D] into the slots int64 [T] of the cache."""
    if keys.device.type == "cpu":
        cpu.write_kv(keys, values, layer, slot_mapping)
        return
    _require_cuda(keys.device)
    from kernels import paged_attention

    paged_attention.write_kv(keys, values, layer, slot_mapping)


def attention(
    query: Tensor, layer: PagedLayer, batch: AttentionBatch, *, softmax_scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's cached blocks: [T, H, D] in the query's dtype."""
    if query.device.type == "cpu":
        return cpu.paged_attention(query, layer, batch, softmax_scale=softmax_scale, sliding_window=sliding_window)
    _require_cuda(query.device)
    from kernels.paged_attention import paged_attention

    return paged_attention(query, layer, batch, softmax_scale=softmax_scale, sliding_window=sliding_window)


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"there are no kernels for the device {device}; use cpu or cuda")
