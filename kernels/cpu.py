"""The operations on a CPU, at a useful speed: torch's int4 op and dense products, attention by gathered blocks.

Legend: M = rows, N = out features, K = in features, T = tokens of the step, B = sequences, H = heads, D = head width.
"""

import torch
from torch import Tensor

from kernels.layout import PackedWeight, WeightLayout, unpack_int4_cpu
from kernels.paged_batch import AttentionBatch, PagedLayer

MAX_INT4_OP_ROWS = 64


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times an INT4_CPU weight [N, K] transposed: [M, N] in x's dtype.

    Whatever M, x is rounded to bf16, products are summed in float32 and the sum is rounded to bf16, as torch's int4
    op does it; only the order of summation depends on M. Raises ValueError for another layout or a K that differs.
    """
    if weight.layout is not WeightLayout.INT4_CPU:
        raise ValueError(f"the CPU kernel reads the int4_cpu layout, not {weight.layout.value}")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has K={x.shape[1]}, the weight has K={weight.shape[1]}")
    rounded = x.to(torch.bfloat16)
    if x.shape[0] <= MAX_INT4_OP_ROWS:
        output: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rounded, weight.codes, weight.group_size, weight.scales
        )
    else:
        output = (rounded.float() @ dequantize(weight)).to(torch.bfloat16)
    output = output[:, : weight.shape[0]].to(x.dtype)
    return output if bias is None else output + bias


def dequantize(weight: PackedWeight) -> Tensor:
    """An INT4_CPU weight as float32 [K, N'], padding included: what the int4 op multiplies by."""
    scales, offsets = weight.scales.float().unbind(dim=-1)
    groups = unpack_int4_cpu(weight).float().view(-1, weight.group_size, scales.shape[1])
    # (code - 8) * scale + offset; 8 * scale is exact, and so is the sum in float32
    return torch.addcmul((offsets - 8 * scales)[:, None], groups, scales[:, None]).flatten(0, 1)


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Write keys and values [T, H_kv, D] into the slots int64 [T] of the cache."""
    blocks, offsets = slot_mapping // layer.block_size, slot_mapping % layer.block_size
    layer.keys[blocks, :, offsets] = keys.to(layer.keys.dtype)
    layer.values[blocks, :, offsets] = values.to(layer.values.dtype)


def paged_attention(
    query: Tensor, layer: PagedLayer, batch: AttentionBatch, *, softmax_scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's blocks; [T, H, D]. See `kernels.reference`."""
    output = torch.empty_like(query)
    starts = batch.query_starts.tolist()
    for sequence, context_len in enumerate(batch.context_lens.tolist()):
        start, stop = starts[sequence], starts[sequence + 1]
        blocks = batch.block_tables[sequence, : -(-context_len // layer.block_size)]
        keys, values = (
            cache.index_select(0, blocks).transpose(0, 1).flatten(1, 2)[:, :context_len]
            for cache in (layer.keys, layer.values)
        )
        query_positions = torch.arange(context_len - (stop - start), context_len)[:, None]
        key_positions = torch.arange(context_len)[None, :]
        visible = key_positions <= query_positions
        if sliding_window is not None:
            visible &= key_positions > query_positions - sliding_window
        output[start:stop] = torch.nn.functional.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=visible,
            scale=softmax_scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    return output
