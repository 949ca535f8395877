"""Attention over the paged cache, and the write into it: Triton kernels and their checked wrappers.

Sequences with one new token are decoded in spans of fixed size, merged in order; the others are prefilled in tiles of
tokens. Which kernel a sequence takes, and its sums, never depend on its neighbours in the batch.
Legend: T = tokens of the step, B = sequences, H = query heads, H_kv = key/value heads, D = head width.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_operands import AttentionOperands, check_attention, check_write
from kernels.attention_span import above, attend_span
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.tiles import COPY_WARPS, DECODE_TILE, MERGE_WARPS, SPAN_TOKENS, head_tile, prefill_tile, row_tile


@triton.jit(do_not_specialize=["table_stride", "num_spans", "sliding_window"])
def decode_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    num_spans: tl.tensor,
    exponent_scale: tl.tensor,
    sliding_window: tl.tensor,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (span, key head, sequence) attends the head's GROUP query heads to SPAN cached tokens.

    query [T, H, D]; keys, values [num_blocks, H_kv, BLOCK_SIZE, D]; tables [B, max_blocks]. Writes totals float32
    [B, H, num_spans, D] and stats float32 [B, H, num_spans, 2]: the largest score, the sum of weights. Sequences with
    another number of new tokens than one, and spans outside context and window, are left unwritten.
    """
    span, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts_ptr + sequence)
    context_len = tl.load(context_lens_ptr + sequence)
    first_key = tl.maximum(span * SPAN, context_len - sliding_window)
    last_key = tl.minimum((span + 1) * SPAN, context_len)
    if (tl.load(query_starts_ptr + sequence + 1) - token != 1) | (first_key >= last_key):
        return
    rows = tl.arange(0, TILE_ROWS)
    width = tl.arange(0, TILE_WIDTH)
    heads = kv_head * GROUP + rows
    mask = (rows < GROUP)[:, None] & (width < HEAD_WIDTH)[None, :]
    query_offsets = token.to(tl.int64) * token_stride + heads[:, None] * head_stride + width[None, :]
    query = tl.load(query_ptr + query_offsets, mask=mask, other=0.0)
    head_offset = kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_WIDTH)
    total, largest, weight_sum = attend_span(
        query,
        tl.zeros((TILE_ROWS,), tl.int32) + (context_len - 1),
        keys_ptr + head_offset,
        values_ptr + head_offset,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        first_key,
        last_key,
        block_stride,
        exponent_scale,
        sliding_window,
        BLOCK_SIZE,
        HEAD_WIDTH,
        TILE_WIDTH,
        TILE_ROWS,
        TILE_KEYS,
        INTERPRETED,
    )
    parts = (sequence.to(tl.int64) * tl.num_programs(1) * GROUP + heads) * num_spans + span
    tl.store(totals_ptr + parts[:, None] * HEAD_WIDTH + width[None, :], total, mask=mask)
    tl.store(stats_ptr + parts * 2, largest, mask=rows < GROUP)
    tl.store(stats_ptr + parts * 2 + 1, weight_sum, mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_spans", "sliding_window"])
def merge_kernel(
    totals_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_spans: tl.tensor,
    exponent_scale: tl.tensor,
    sliding_window: tl.tensor,
    SPAN: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """Program (head, sequence) merges what `decode_kernel` wrote, first span to last, into out [T, H, D]."""
    head, sequence = tl.program_id(0), tl.program_id(1)
    token = tl.load(query_starts_ptr + sequence)
    if tl.load(query_starts_ptr + sequence + 1) - token != 1:
        return
    context_len = tl.load(context_lens_ptr + sequence)
    width = tl.arange(0, TILE_WIDTH)
    first_part = (sequence.to(tl.int64) * tl.num_programs(0) + head) * num_spans
    total = tl.zeros((TILE_WIDTH,), tl.float32)
    largest = tl.full((1,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((1,), tl.float32)
    for span in range(tl.maximum(context_len - sliding_window, 0) // SPAN, tl.cdiv(context_len, SPAN)):
        part = first_part + span
        span_largest = tl.load(stats_ptr + part * 2)
        new_largest = tl.maximum(largest, span_largest)
        decay = above(largest, new_largest, exponent_scale)
        span_decay = above(span_largest, new_largest, exponent_scale)
        span_total = tl.load(totals_ptr + part * HEAD_WIDTH + width, mask=width < HEAD_WIDTH, other=0.0)
        total = tl.fma(total, tl.broadcast_to(decay, total.shape), span_total * span_decay)
        weight_sum = tl.fma(weight_sum, decay, tl.load(stats_ptr + part * 2 + 1) * span_decay)
        largest = new_largest
    out_offset = (token.to(tl.int64) * tl.num_programs(0) + head) * HEAD_WIDTH
    tl.store(out_ptr + out_offset + width, (total / weight_sum).to(out_ptr.dtype.element_ty), mask=width < HEAD_WIDTH)


@triton.jit(do_not_specialize=["table_stride", "sliding_window"])
def prefill_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    out_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    block_stride: tl.tensor,
    exponent_scale: tl.tensor,
    sliding_window: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (token tile, key head, sequence) attends TILE_ROWS // GROUP new tokens, each with GROUP query heads.

    Operands as in `decode_kernel`; out [T, H, D]. Sequences with one new token are left to `decode_kernel`.
    """
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TILE_TOKENS: tl.constexpr = TILE_ROWS // GROUP
    first_token = tl.load(query_starts_ptr + sequence)
    query_len = tl.load(query_starts_ptr + sequence + 1) - first_token
    if (query_len == 1) | (tile * TILE_TOKENS >= query_len):
        return
    context_len = tl.load(context_lens_ptr + sequence)
    first_position = context_len - query_len
    rows = tl.arange(0, TILE_ROWS)
    width = tl.arange(0, TILE_WIDTH)
    query_tokens = tile * TILE_TOKENS + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    tokens = (first_token + query_tokens).to(tl.int64)
    real = (rows < TILE_TOKENS * GROUP) & (query_tokens < query_len)
    mask = real[:, None] & (width < HEAD_WIDTH)[None, :]
    query_offsets = tokens[:, None] * token_stride + heads[:, None] * head_stride + width[None, :]
    query = tl.load(query_ptr + query_offsets, mask=mask, other=0.0)
    head_offset = kv_head.to(tl.int64) * (BLOCK_SIZE * HEAD_WIDTH)
    total, _, weight_sum = attend_span(
        query,
        first_position + query_tokens,
        keys_ptr + head_offset,
        values_ptr + head_offset,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        tl.maximum(first_position + tile * TILE_TOKENS - sliding_window + 1, 0),
        tl.minimum(first_position + (tile + 1) * TILE_TOKENS, context_len),
        block_stride,
        exponent_scale,
        sliding_window,
        BLOCK_SIZE,
        HEAD_WIDTH,
        TILE_WIDTH,
        TILE_ROWS,
        TILE_KEYS,
        INTERPRETED,
    )
    # rows that only pad the tile may have seen nothing; they are not stored
    result = total / tl.where(real, weight_sum, 1.0)[:, None]
    out_offsets = (tokens * tl.num_programs(1) * GROUP + heads)[:, None] * HEAD_WIDTH + width[None, :]
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_kv_kernel(
    new_keys_ptr: tl.tensor,
    new_values_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    block_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """Program (token) copies its keys and values [H_kv, D] into slot block * BLOCK_SIZE + offset of the cache."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.arange(0, TILE_HEADS)[:, None]
    width = tl.arange(0, TILE_WIDTH)[None, :]
    mask = (heads < NUM_HEADS) & (width < HEAD_WIDTH)
    source = heads * HEAD_WIDTH + width
    target = slot // BLOCK_SIZE * block_stride + (heads * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_WIDTH + width
    keys = tl.load(new_keys_ptr + token * key_stride + source, mask=mask)
    tl.store(keys_ptr + target, keys, mask=mask)
    values = tl.load(new_values_ptr + token * value_stride + source, mask=mask)
    tl.store(values_ptr + target, values, mask=mask)


def paged_attention(
    query: Tensor, layer: PagedLayer, batch: AttentionBatch, *, softmax_scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of query [T, H, D] fp16 or bf16 over each sequence's cached tokens: [T, H, D].

    With a sliding window, a token sees itself and the `sliding_window - 1` tokens before it. Scores and sums are
    float32. Raises ValueError for operands that do not fit.
    """
    operands = check_attention(query, layer, batch, softmax_scale=softmax_scale, sliding_window=sliding_window)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if query.shape[0] == 0:
        return out
    # both, for a mixed batch: a sequence is left alone by the kernel that is not for it
    _decode(operands, out)
    if batch.max_query_len > 1:
        _prefill(operands, out)
    return out


def _decode(operands: AttentionOperands, out: Tensor) -> None:
    query, layer, batch = operands.query, operands.layer, operands.batch
    num_sequences, num_heads, width = len(batch.context_lens), query.shape[1], query.shape[2]
    num_spans = triton.cdiv(batch.max_context_len, SPAN_TOKENS)
    totals = torch.empty((num_sequences, num_heads, num_spans, width), dtype=torch.float32, device=query.device)
    stats = torch.empty((num_sequences, num_heads, num_spans, 2), dtype=torch.float32, device=query.device)
    decode_kernel[(num_spans, layer.keys.shape[1], num_sequences)](
        query,
        layer.keys,
        layer.values,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        totals,
        stats,
        query.stride(0),
        query.stride(1),
        batch.block_tables.stride(0),
        layer.keys.stride(0),
        num_spans,
        operands.exponent_scale,
        operands.sliding_window,
        GROUP=operands.group,
        SPAN=SPAN_TOKENS,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        TILE_WIDTH=head_tile(width),
        TILE_ROWS=row_tile(DECODE_TILE, operands.group),
        TILE_KEYS=DECODE_TILE.num_keys,
        INTERPRETED=IS_INTERPRETED,
        num_warps=DECODE_TILE.num_warps,
        num_stages=DECODE_TILE.num_stages,
        enable_fp_fusion=FUSE_FLOATS,
    )
    merge_kernel[(num_heads, num_sequences)](
        totals,
        stats,
        batch.query_starts,
        batch.context_lens,
        out,
        num_spans,
        operands.exponent_scale,
        operands.sliding_window,
        SPAN=SPAN_TOKENS,
        HEAD_WIDTH=width,
        TILE_WIDTH=head_tile(width),
        num_warps=MERGE_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )


def _prefill(operands: AttentionOperands, out: Tensor) -> None:
    query, layer, batch = operands.query, operands.layer, operands.batch
    width = query.shape[2]
    tile = prefill_tile(operands.query.shape[2], operands.group)
    tile_rows = row_tile(tile, operands.group)
    num_tiles = triton.cdiv(batch.max_query_len, tile_rows // operands.group)
    prefill_kernel[(num_tiles, layer.keys.shape[1], len(batch.context_lens))](
        query,
        layer.keys,
        layer.values,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        out,
        query.stride(0),
        query.stride(1),
        batch.block_tables.stride(0),
        layer.keys.stride(0),
        operands.exponent_scale,
        operands.sliding_window,
        GROUP=operands.group,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        TILE_WIDTH=head_tile(width),
        TILE_ROWS=tile_rows,
        TILE_KEYS=tile.num_keys,
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=FUSE_FLOATS,
    )


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Write keys and values [T, H_kv, D], in the cache's dtype, into the slots int64 [T]. Raises ValueError."""
    check_write(keys, values, layer, slot_mapping)
    num_tokens, num_heads, width = keys.shape
    if num_tokens == 0:
        return
    write_kv_kernel[(num_tokens,)](
        keys,
        values,
        layer.keys,
        layer.values,
        slot_mapping,
        keys.stride(0),
        values.stride(0),
        layer.keys.stride(0),
        NUM_HEADS=num_heads,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        TILE_HEADS=triton.next_power_of_2(num_heads),
        TILE_WIDTH=head_tile(width),
        num_warps=COPY_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
