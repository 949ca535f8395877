"""The fused operations in plain torch, in float32: the definitions that `fused_*.py` are tested against.

Legend: T = tokens of the step, M = rows, K = width of a row, H = query heads, H_kv = key/value heads, D = head width,
R = rotated elements of a head.
"""

import torch
from torch import Tensor

from kernels.paged_batch import PagedLayer
from kernels.reference import write_kv
from kernels.rotary import HeadNorms, Rotation


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., K] / rms(x) * weight [K], rounded once to x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon) * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and the sum itself, which is rounded to their dtype before it is normalized."""
    total = x + residual
    return rms_norm(total, weight, epsilon), total


def silu_gate(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns times the second half: [M, 2K] to [M, K]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def gelu_gate(gate_up: Tensor) -> Tensor:
    """As `silu_gate`, with GELU in its tanh approximation."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def gather_rows(token_ids: Tensor, table: Tensor) -> Tensor:
    """Row token_ids[t] of table [V, K] for each t: [T, K]; NaN for an id outside of the table."""
    inside = (token_ids >= 0) & (token_ids < len(table))
    rows = table[torch.where(inside, token_ids, 0)]
    return rows.masked_fill(~inside[:, None], float("nan"))


def gather_int8_rows(token_ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """As `gather_rows` from codes int8 [V, K] times scales [V], in the dtype of the scales."""
    return gather_rows(token_ids, (codes.float() * scales.float()[:, None]).to(scales.dtype))


def rotate_and_write(
    heads: Tensor, rotation: Rotation, norms: HeadNorms | None, layer: PagedLayer, slot_mapping: Tensor
) -> Tensor:
    """Norm and rotate the queries and keys among heads [T, H + 2 H_kv, D]; write keys and values into their slots.

    Returns the queries [T, H, D].
    """
    num_kv_heads = layer.keys.shape[1]
    first_key, first_value = heads.shape[1] - 2 * num_kv_heads, heads.shape[1] - num_kv_heads
    queries, keys, values = heads.tensor_split([first_key, first_value], dim=1)
    if norms is not None:
        queries = rms_norm(queries, norms.query_weight, norms.epsilon)
        keys = rms_norm(keys, norms.key_weight, norms.epsilon)
    write_kv(_rotate(keys, rotation), values, layer, slot_mapping)
    return _rotate(queries, rotation)


def _rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Element i of the first R of a head pairs with element i + R / 2; those after R stay."""
    cosines, signed_sines = rotation.cosines.float()[:, None], rotation.signed_sines.float()[:, None]
    rotated, kept = heads.float().tensor_split([cosines.shape[-1]], dim=-1)
    swapped = torch.roll(rotated, rotated.shape[-1] // 2, dims=-1)
    return torch.cat((rotated * cosines + swapped * signed_sines, kept), dim=-1).to(heads.dtype)
