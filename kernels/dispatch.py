"""Picks the kernel for an operation from (device, rows) in plain functions. An absent kernel is an error."""

import os
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from kernels import cpu, cpu_attention, cpu_experts, cpu_lora, reference
from kernels.cpu_attention import CpuAttentionPlan
from kernels.cpu_experts import CpuExpertPlan, CpuExperts
from kernels.experts import PackedExperts, Routing, SortedRows, stack_experts, with_scales_alike
from kernels.layout import (
    NIBBLE_BITS,
    PackedWeight,
    WeightLayout,
    planar_on_device,
    repack_int4_cpu,
    repack_planar,
)
from kernels.lora import AdapterRows, LoraStack
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.rotary import HeadNorms, Rotation
from kernels.tiles import grouped_rows, is_dense

# in a process that is told so, a CPU's tensors are for the Triton kernels too, which then must be interpreted
# (TRITON_INTERPRET=1): the rehearsal of a GPU where there is none
TRITON_ON_CPU = "AWQ_TRITON_ON_CPU"
_TRITON_DEVICES = ("cuda", "cpu") if os.environ.get(TRITON_ON_CPU) == "1" else ("cuda",)

# up to here the GPU kernel for few rows (decode) is used, above the one for many (prefill)
MAX_GEMV_ROWS = 64

# on a GPU the batch itself is the plan: its kernels read block tables
AttentionPlan = AttentionBatch | CpuAttentionPlan

ExpertPlan = SortedRows | CpuExpertPlan
# weights [N, K] of all experts of a layer: packed, or dense [E, N, K] in the dtype of the activations
ExpertWeights = PackedExperts | CpuExperts | Tensor


def runs_triton(device: torch.device) -> bool:
    """Whether the device's kernels are the Triton ones. Raises ValueError for a device without kernels."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"there are no kernels for the device {device}; use cpu or cuda")
    return device.type in _TRITON_DEVICES


def runtime_layout(device: torch.device) -> WeightLayout:
    """The layout that the device's kernels read. Raises ValueError for a device without kernels."""
    return WeightLayout.PLANAR if runs_triton(device) else WeightLayout.INT4_CPU


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
    if not runs_triton(x.device):
        return cpu.quantized_linear(x, weight, bias)
    if x.shape[0] <= MAX_GEMV_ROWS:
        from kernels.gemv_int4 import gemv_int4

        return gemv_int4(x, weight, bias)
    from kernels.launch import launch_arch

    if is_dense(launch_arch({"x": x}), x.shape[0]):
        from kernels.dequantize_int4 import dequantize_int4

        return torch.nn.functional.linear(x, dequantize_int4(weight, x.dtype), bias)
    from kernels.gemm_int4 import gemm_int4

    return gemm_int4(x, weight, bias)


def max_rows_together(device: torch.device) -> int:
    """How many rows a linear layer takes with no row's result depending on the others."""
    return MAX_GEMV_ROWS if runs_triton(device) else cpu.cpu_traits().max_int4_op_rows


def prepare_experts(weights: Sequence[PackedWeight], device: torch.device) -> ExpertWeights:
    """ROW_MAJOR weights of equal shape, bits, groups and type of scales, one an expert, as the device's kernels read.

    Raises ValueError as `prepare_weight` does, and for weights that differ.
    """
    if not runs_triton(device):
        return CpuExperts(tuple(prepare_weight(weight, device) for weight in weights))
    return stack_experts([prepare_weight(weight, device) for weight in with_scales_alike(weights)])


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times a router's weight [E, K] transposed: [T, E] in x's dtype."""
    if not runs_triton(x.device):
        return cpu_experts.router_logits(x, weight)
    return torch.nn.functional.linear(x, weight)


def route(logits: Tensor, num_choices: int, *, renormalized: bool) -> Routing:
    """The likeliest experts of each token, for a router's logits [T, E], as `kernels.reference.route` defines them."""
    if not runs_triton(logits.device):
        return reference.route(logits, num_choices, renormalized=renormalized)
    from kernels.fused_routing import route

    return route(logits, num_choices, renormalized=renormalized)


def plan_experts(experts: Tensor, num_experts: int) -> ExpertPlan:
    """What the layers of one mixture share, for the choices experts int64 [T, C] of its tokens."""
    if not runs_triton(experts.device):
        return cpu_experts.plan_experts(experts, num_experts)
    from kernels.fused_routing import sorted_by_expert

    return sorted_by_expert(experts, num_experts, grouped_rows(experts.numel(), num_experts))


def grouped_linear(x: Tensor, weights: ExpertWeights, plan: ExpertPlan) -> Tensor:
    """Each assignment's row of x times its expert's weight, transposed: [A, N] in x's dtype, in assignments' order.

    x: [T, K], where the assignments of a token share its row, or [A, K].
    """
    if isinstance(plan, CpuExpertPlan):
        if isinstance(weights, PackedExperts):
            raise ValueError("experts in the planar layout are multiplied on a GPU")
        return cpu_experts.grouped_linear(x, weights, plan)
    if isinstance(weights, CpuExperts):
        raise ValueError("experts in the int4_cpu layout are multiplied on a CPU")
    if isinstance(weights, Tensor):
        from kernels.grouped_dense import grouped_dense

        return grouped_dense(x, weights, plan)
    from kernels.grouped_int4 import grouped_int4

    return grouped_int4(x, weights, plan)


def sum_choices(choices: Tensor, router: Tensor) -> Tensor:
    """choices [T * C, N] times router weights float32 [T, C], summed over a token's choices in order: [T, N]."""
    if not runs_triton(choices.device):
        return cpu_experts.sum_choices(choices, router)
    from kernels.grouped_int4 import sum_choices

    return sum_choices(choices, router)


def add_lora(out: Tensor, x: Tensor, stack: LoraStack, rows: AdapterRows) -> None:
    """Add to rows of out [T, N] what their adapters make of those of x [T, K]; the others are not touched."""
    if not runs_triton(x.device):
        cpu_lora.add_lora(out, x, stack, rows)
        return
    from kernels.fused_lora import add_lora

    add_lora(out, x, stack, rows)


def gather_rows(token_ids: Tensor, table: Tensor) -> Tensor:
    """The rows of a table [V, K] that token_ids int64 [T] name: [T, K].

    An id outside of the table is an error on a CPU, and a row of NaN on a GPU, which cannot raise.
    """
    if not runs_triton(table.device):
        return torch.nn.functional.embedding(token_ids, table)
    from kernels.fused_embedding import gather_rows

    return gather_rows(token_ids, table)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [M, K] / rms(x) * weight [K] per row, computed in float32, in x's dtype."""
    if not runs_triton(x.device):
        return cpu.rms_norm(x, weight, epsilon)
    from kernels.fused_norm import rms_norm

    return rms_norm(x, weight, epsilon)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The rms norm of x + residual, both [M, K], and that sum, which is in their dtype."""
    if not runs_triton(x.device):
        total = residual + x
        return cpu.rms_norm(total, weight, epsilon), total
    from kernels.fused_norm import add_rms_norm

    return add_rms_norm(x, residual, weight, epsilon)


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns times the second half: [M, 2K] to [M, K]."""
    if not runs_triton(gate_up.device):
        gate, up = gate_up.chunk(2, dim=-1)
        return cpu.activate(torch.nn.functional.silu, gate) * up
    from kernels.fused_activation import silu_gate

    return silu_gate(gate_up)


def gelu_gate(gate_up: Tensor) -> Tensor:
    """As `silu_gate`, with GELU in its tanh approximation."""
    if not runs_triton(gate_up.device):
        gate, up = gate_up.chunk(2, dim=-1)
        return cpu.activate(partial(torch.nn.functional.gelu, approximate="tanh"), gate) * up
    from kernels.fused_activation import gelu_gate

    return gelu_gate(gate_up)


def plan_attention(batch: AttentionBatch, layer: PagedLayer, windows: Iterable[int | None]) -> AttentionPlan:
    """What all layers of a step share: caches of the shape of `layer`, sliding windows among `windows`."""
    if not runs_triton(layer.keys.device):
        return cpu_attention.plan_attention(batch, layer, windows)
    return batch


def rotate_and_write(
    heads: Tensor, rotation: Rotation, norms: HeadNorms | None, layer: PagedLayer, plan: AttentionPlan
) -> Tensor:
    """Norm and rotate the queries and keys among heads [T, H + 2 H_kv, D]; write the step's keys and values.

    heads: queries, then keys, then values. Returns the queries [T, H, D].
    """
    if isinstance(plan, CpuAttentionPlan):
        return cpu_attention.rotate_and_write(heads, rotation, norms, layer, plan)
    from kernels.fused_rotary import rotate_and_write

    return rotate_and_write(heads, rotation, norms, layer, plan.slot_mapping)


def attention(
    query: Tensor,
    layer: PagedLayer,
    plan: AttentionPlan,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's cached blocks: [T, H, D] in the query's dtype.

    The settings as in `kernels.reference.paged_attention`.
    """
    if isinstance(plan, CpuAttentionPlan):
        return cpu_attention.paged_attention(
            query,
            layer,
            plan,
            softmax_scale=softmax_scale,
            sliding_window=sliding_window,
            soft_cap=soft_cap,
            sinks=sinks,
        )
    from kernels.paged_attention import paged_attention

    return paged_attention(
        query,
        layer,
        plan,
        softmax_scale=softmax_scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        sinks=sinks,
    )
