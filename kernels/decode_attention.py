"""Attention of sequences with one new token: Triton kernels over spans of the cache, merged in order.

The span's size is fixed, so that a sequence's sums never depend on its neighbours in the batch.
Legend: T = tokens of the step, B = sequences, H = query heads, H_kv = key/value heads, D = head width.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_operands import AttentionOperands
from kernels.attention_scores import LOG2_E, above, power_of_two_below
from kernels.attention_span import attend_span
from kernels.kv_words import CODE_UNITS
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED, operand
from kernels.tiles import MERGE_WARPS, SPAN_TOKENS, decode_tile, head_tile, row_tile


@triton.jit(do_not_specialize=["table_stride", "num_spans", "sliding_window"])
def decode_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    num_spans: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    sliding_window: tl.tensor,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CODES: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (span, key head, sequence) attends the head's GROUP query heads to SPAN cached tokens.

    query [T, H, D]; keys, values and scales as in `PagedLayer`, codes as int16 words; tables [B, max_blocks]. Writes
    totals float32 [B, H, num_spans, D] and stats float32 [B, H, num_spans, 2]: the largest exponent, the sum of
    weights. Sequences with another number of new tokens than one, and spans outside context and window, are left
    unwritten.
    """
    span, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = tl.load(query_starts_ptr + sequence)
    context_len = tl.load(context_lens_ptr + sequence)
    first_key = tl.maximum(span * SPAN, context_len - sliding_window)
    last_key = tl.minimum((span + 1) * SPAN, context_len)
    if (tl.load(query_starts_ptr + sequence + 1) - token != 1) | (first_key >= last_key):
        return
    rows = tl.arange(0, TILE_ROWS)
    heads = kv_head * GROUP + rows
    head_ptrs = query_ptr + token.to(tl.int64) * token_stride + heads[None, :] * head_stride
    head_slots = kv_head.to(tl.int64) * BLOCK_SIZE
    WORD_WIDTH: tl.constexpr = HEAD_WIDTH if CODES is None else HEAD_WIDTH // 2
    if CODES is None:
        width = tl.arange(0, TILE_WIDTH)
        mask = (width < HEAD_WIDTH)[:, None] & (rows < GROUP)[None, :]
        query = operand(tl.load(head_ptrs + width[:, None], mask=mask, other=0.0), INTERPRETED)
        query_high = query
    else:
        # two codes a word: the query's even elements against the low ones, its odd against the high
        word = tl.arange(0, TILE_WIDTH // 2)
        mask = (word < HEAD_WIDTH // 2)[:, None] & (rows < GROUP)[None, :]
        even = tl.load(head_ptrs + 2 * word[:, None], mask=mask, other=0.0).to(tl.float32)
        odd = tl.load(head_ptrs + 2 * word[:, None] + 1, mask=mask, other=0.0).to(tl.float32)
        unit = power_of_two_below(tl.maximum(tl.max(tl.abs(even), 0), tl.max(tl.abs(odd), 0)))[None, :]
        query = operand((even / unit).to(tl.float16), INTERPRETED)
        query_high = operand((odd / unit).to(tl.float16), INTERPRETED)
        score_scale = unit * (score_scale * CODE_UNIT)
        key_scales_ptr += head_slots
        value_scales_ptr += head_slots
    total, largest, weight_sum = attend_span(
        query,
        query_high,
        context_len - 1,
        keys_ptr + head_slots * WORD_WIDTH,
        values_ptr + head_slots * WORD_WIDTH,
        key_scales_ptr,
        value_scales_ptr,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        first_key,
        last_key,
        tl.num_programs(1).to(tl.int64) * BLOCK_SIZE,
        score_scale,
        soft_cap,
        sliding_window,
        BLOCK_SIZE,
        HEAD_WIDTH,
        TILE_WIDTH,
        TILE_ROWS,
        TILE_KEYS,
        CODES,
        INTERPRETED,
    )
    parts = (sequence.to(tl.int64) * tl.num_programs(1) * GROUP + heads) * num_spans + span
    out_width = tl.arange(0, TILE_WIDTH)
    out_mask = (out_width < HEAD_WIDTH)[:, None] & (rows < GROUP)[None, :]
    tl.store(totals_ptr + parts[None, :] * HEAD_WIDTH + out_width[:, None], total * CODE_UNIT, mask=out_mask)
    tl.store(stats_ptr + parts * 2, largest, mask=rows < GROUP)
    tl.store(stats_ptr + parts * 2 + 1, weight_sum, mask=rows < GROUP)


@triton.jit(do_not_specialize=["num_spans", "sliding_window"])
def merge_kernel(
    totals_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_spans: tl.tensor,
    sliding_window: tl.tensor,
    SPAN: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> None:
    """Program (head, sequence) merges what `decode_kernel` wrote, first span to last, into out [T, H, D].

    sinks [H], if there are any, are logits that take weight and give no value.
    """
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
    if sinks_ptr is not None:
        # as a span whose only weight belongs to no token
        largest = tl.zeros((1,), tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * LOG2_E
        weight_sum += 1.0
    for span in range(tl.maximum(context_len - sliding_window, 0) // SPAN, tl.cdiv(context_len, SPAN)):
        part = first_part + span
        span_largest = tl.load(stats_ptr + part * 2)
        new_largest = tl.maximum(largest, span_largest)
        decay = above(largest, new_largest)
        span_decay = above(span_largest, new_largest)
        span_total = tl.load(totals_ptr + part * HEAD_WIDTH + width, mask=width < HEAD_WIDTH, other=0.0)
        total = tl.fma(total, tl.broadcast_to(decay, total.shape), span_total * span_decay)
        weight_sum = tl.fma(weight_sum, decay, tl.load(stats_ptr + part * 2 + 1) * span_decay)
        largest = new_largest
    out_offset = (token.to(tl.int64) * tl.num_programs(0) + head) * HEAD_WIDTH
    tl.store(out_ptr + out_offset + width, (total / weight_sum).to(out_ptr.dtype.element_ty), mask=width < HEAD_WIDTH)


def decode(operands: AttentionOperands, out: Tensor) -> None:
    """Attend the sequences with one new token, and leave the others' rows of out [T, H, D] alone."""
    query, layer, batch = operands.query, operands.layer, operands.batch
    num_sequences, num_heads, width = len(batch.context_lens), query.shape[1], query.shape[2]
    num_spans = triton.cdiv(batch.max_context_len, SPAN_TOKENS)
    totals = torch.empty((num_sequences, num_heads, num_spans, width), dtype=torch.float32, device=query.device)
    stats = torch.empty((num_sequences, num_heads, num_spans, 2), dtype=torch.float32, device=query.device)
    tile = decode_tile(width)
    decode_kernel[(num_spans, layer.keys.shape[1], num_sequences)](
        query,
        operands.keys,
        operands.values,
        layer.key_scales,
        layer.value_scales,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        totals,
        stats,
        query.stride(0),
        query.stride(1),
        batch.block_tables.stride(0),
        num_spans,
        operands.score_scale,
        operands.soft_cap,
        operands.sliding_window,
        GROUP=operands.group,
        SPAN=SPAN_TOKENS,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        TILE_WIDTH=head_tile(width),
        TILE_ROWS=row_tile(tile, operands.group),
        TILE_KEYS=tile.num_keys,
        CODES=operands.codes,
        CODE_UNIT=CODE_UNITS[operands.codes],
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
        enable_fp_fusion=FUSE_FLOATS,
    )
    _merge(operands, totals, stats, out)


def _merge(operands: AttentionOperands, totals: Tensor, stats: Tensor, out: Tensor) -> None:
    batch = operands.batch
    num_sequences, num_heads, num_spans, width = totals.shape
    merge_kernel[(num_heads, num_sequences)](
        totals,
        stats,
        operands.sinks,
        batch.query_starts,
        batch.context_lens,
        out,
        num_spans,
        operands.sliding_window,
        SPAN=SPAN_TOKENS,
        HEAD_WIDTH=width,
        TILE_WIDTH=head_tile(width),
        num_warps=MERGE_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
