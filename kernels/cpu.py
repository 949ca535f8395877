"""The operations on a CPU, at a useful speed: torch's int4 op and dense products, attention over gathered keys.

Legend: M = rows, N = out features, K = in features, T = tokens of the step, B = sequences, H = heads, D = head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import PackedWeight, WeightLayout, unpack_int4_cpu
from kernels.paged_batch import AttentionBatch, PagedLayer

# bounds the keys and values that are gathered at once, which would not stay in the cache of the processor anyway
MAX_GATHERED_TOKENS = 8192
# queries of a prompt that share one mask: later keys than the last of them are never touched
QUERY_BLOCK = 256


@dataclass(frozen=True)
class CpuTraits:
    """max_int4_op_rows: above, a weight is dequantized as a whole. dense_dtype: what the dense product then runs in."""

    max_int4_op_rows: int
    dense_dtype: torch.dtype


# AVX2, measured on one core (AMD Zen, 2 GHz), 3072x576, int4 op against dequantization (4.3 ms) and float32 product:
# 1 row 0.4 against 5.3 ms, 32 rows 7.4 against 9.3, 64 rows 14.5 against 13.0, 128 rows 29 against 19
AVX2_TRAITS = CpuTraits(max_int4_op_rows=64, dense_dtype=torch.float32)
# with bf16 matrix instructions the dense product is about nine times the int4 op's speed (one Xeon core, 4096x4096:
# 767 against 83 GFLOP/s), and the dequantization is what has to pay off; not measured with it
BF16_TRAITS = CpuTraits(max_int4_op_rows=32, dense_dtype=torch.bfloat16)


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


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Write keys and values [T, H_kv, D] into the slots int64 [T] of the cache."""
    rows = _cache_rows(slot_mapping // layer.block_size, slot_mapping % layer.block_size, layer).flatten()
    for cache, new in ((layer.keys, keys), (layer.values, values)):
        cache.view(-1, cache.shape[-1]).index_copy_(0, rows, new.to(cache.dtype).flatten(0, 1))


def paged_attention(
    query: Tensor, layer: PagedLayer, batch: AttentionBatch, *, softmax_scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's blocks; [T, H, D]. See `kernels.reference`.

    Sequences with one new token are attended together, padded to the longest; prompts one after the other. A slot of
    the cache is read only by the sequence that wrote it.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    starts, context_lens = batch.query_starts.tolist(), batch.context_lens.tolist()
    settings = _AttentionSettings(softmax_scale, sliding_window or batch.max_context_len)
    single: list[int] = []
    for sequence, context_len in enumerate(context_lens):
        start, stop = starts[sequence], starts[sequence + 1]
        if stop - start == 1:
            single.append(sequence)
        else:
            table = batch.block_tables[sequence : sequence + 1]
            output[start:stop] = _attend_prompt(query[start:stop], layer, table, context_len, settings)
    sequences_at_once = max(1, MAX_GATHERED_TOKENS // batch.max_context_len)
    for first in range(0, len(single), sequences_at_once):
        sequences = single[first : first + sequences_at_once]
        lens = [context_lens[sequence] for sequence in sequences]
        rows = [starts[sequence] for sequence in sequences]
        output[rows] = _attend_single(query[rows], layer, batch.block_tables[sequences], lens, settings)
    return output


@dataclass(frozen=True)
class _AttentionSettings:
    """window: how many tokens back a token sees, itself included."""

    softmax_scale: float
    window: int


def _attend_single(
    query: Tensor, layer: PagedLayer, block_tables: Tensor, context_lens: list[int], settings: _AttentionSettings
) -> Tensor:
    """One query a sequence, [B, H, D], against the last `window` tokens of its context."""
    num_visible = torch.tensor([min(context_len, settings.window) for context_len in context_lens])
    last = torch.tensor(context_lens) - 1
    steps = torch.arange(int(num_visible.max()))
    # a shorter sequence reads its own last token again, and masks it
    positions = torch.minimum((last - num_visible + 1)[:, None] + steps, last[:, None])
    keys, values = _gather(layer, block_tables, positions)
    # the query heads of a key head take the place of queries of that head: no key is repeated
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.view(len(query), keys.shape[1], -1, query.shape[-1]),
        keys,
        values,
        attn_mask=None if len(query) == 1 else (steps < num_visible[:, None])[:, None, None],
        scale=settings.softmax_scale,
    )
    return attended.reshape(query.shape)


def _attend_prompt(
    query: Tensor, layer: PagedLayer, block_table: Tensor, context_len: int, settings: _AttentionSettings
) -> Tensor:
    """The last tokens of one sequence, [T, H, D], each against its own past: a block of queries after the other."""
    first_query = context_len - len(query)
    first_key = max(0, first_query - settings.window + 1)
    keys, values = _gather(layer, block_table, torch.arange(first_key, context_len)[None])
    outputs = []
    for start in range(first_query, context_len, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, context_len)
        first_visible = max(0, start - settings.window + 1)
        query_positions = torch.arange(start, stop)[:, None]
        key_positions = torch.arange(first_visible, stop)
        visible = (key_positions <= query_positions) & (key_positions > query_positions - settings.window)
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[start - first_query : stop - first_query].transpose(0, 1)[None],
            keys[:, :, first_visible - first_key : stop - first_key],
            values[:, :, first_visible - first_key : stop - first_key],
            attn_mask=visible,
            scale=settings.softmax_scale,
            enable_gqa=True,
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def _gather(layer: PagedLayer, block_tables: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H_kv, L, D] at positions int64 [B, L] of the sequences that own the block tables."""
    blocks = block_tables.long().gather(1, positions // layer.block_size)
    rows = _cache_rows(blocks, positions % layer.block_size, layer).transpose(1, 2)
    keys, values = (
        cache.view(-1, cache.shape[-1]).index_select(0, rows.flatten()).view(*rows.shape, -1)
        for cache in (layer.keys, layer.values)
    )
    return keys, values


def _cache_rows(blocks: Tensor, offsets: Tensor, layer: PagedLayer) -> Tensor:
    """int64 [..., H_kv]: where each head's vector lies when the cache is seen as one list of vectors."""
    num_heads, block_size = layer.keys.shape[1:3]
    heads = torch.arange(num_heads)
    return (blocks[..., None] * num_heads + heads) * block_size + offsets[..., None]
