"""Attention of sequences with several new tokens: prompts, their chunks, drafts. One Triton kernel.

Legend: T = tokens of the step, B = sequences, H = query heads, H_kv = key/value heads, D = head width.
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_operands import AttentionOperands
from kernels.attention_scores import LOG2_E, power_of_two_below
from kernels.attention_span import attend_rows
from kernels.kv_words import CODE_UNITS
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED, operand
from kernels.tiles import head_tile, prefill_tile, row_tile


@triton.jit(do_not_specialize=["table_stride", "sliding_window"])
def prefill_kernel(
    query_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    query_starts_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    out_ptr: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    sliding_window: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CODES: tl.constexpr,
    CODE_UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (token tile, key head, sequence) attends TILE_ROWS // GROUP new tokens, each with GROUP query heads.

    Operands as in `decode_kernel` and `merge_kernel`; out [T, H, D]. Sequences with one new token are left to those.
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
    query_tokens = tile * TILE_TOKENS + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    tokens = (first_token + query_tokens).to(tl.int64)
    real = (rows < TILE_TOKENS * GROUP) & (query_tokens < query_len)
    head_ptrs = query_ptr + tokens[:, None] * token_stride + heads[:, None] * head_stride
    head_slots = kv_head.to(tl.int64) * BLOCK_SIZE
    WORD_WIDTH: tl.constexpr = HEAD_WIDTH if CODES is None else HEAD_WIDTH // 2
    width = tl.arange(0, TILE_WIDTH)
    mask = real[:, None] & (width < HEAD_WIDTH)[None, :]
    if CODES is None:
        query = operand(tl.load(head_ptrs + width[None, :], mask=mask, other=0.0), INTERPRETED)
        query_high = query
    else:
        if TILE_WIDTH > 128:
            numbers = tl.load(head_ptrs + width[None, :], mask=mask, other=0.0).to(tl.float32)
            unit = power_of_two_below(tl.max(tl.abs(numbers), 1))[:, None]
            even, odd = tl.split(tl.reshape((numbers / unit).to(tl.float16), (TILE_ROWS, TILE_WIDTH // 2, 2)))
        else:
            word = tl.arange(0, TILE_WIDTH // 2)
            mask = real[:, None] & (word < HEAD_WIDTH // 2)[None, :]
            even = tl.load(head_ptrs + 2 * word[None, :], mask=mask, other=0.0).to(tl.float32)
            odd = tl.load(head_ptrs + 2 * word[None, :] + 1, mask=mask, other=0.0).to(tl.float32)
            unit = power_of_two_below(tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1)))[:, None]
            even, odd = even / unit, odd / unit
        query, query_high = operand(even.to(tl.float16), INTERPRETED), operand(odd.to(tl.float16), INTERPRETED)
        score_scale = unit * (score_scale * CODE_UNIT)
        key_scales_ptr += head_slots
        value_scales_ptr += head_slots
    largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((TILE_ROWS,), tl.float32)
    if sinks_ptr is not None:
        largest = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2_E
        weight_sum += 1.0
    first_seen = first_position + tile * TILE_TOKENS
    total, weight_sum = attend_rows(
        query,
        query_high,
        first_position + query_tokens,
        keys_ptr + head_slots * WORD_WIDTH,
        values_ptr + head_slots * WORD_WIDTH,
        key_scales_ptr,
        value_scales_ptr,
        tables_ptr + sequence.to(tl.int64) * table_stride,
        tl.maximum(first_seen - sliding_window + 1, 0),
        tl.where(sliding_window < context_len, 0, first_seen + 1),
        tl.minimum(first_seen + TILE_TOKENS, context_len),
        tl.num_programs(1).to(tl.int64) * BLOCK_SIZE,
        score_scale,
        soft_cap,
        sliding_window,
        largest,
        weight_sum,
        BLOCK_SIZE,
        HEAD_WIDTH,
        TILE_WIDTH,
        TILE_ROWS,
        TILE_KEYS,
        CODES,
        INTERPRETED,
    )
    if TILE_WIDTH > 128:  # read again, as no register is left to keep it in through the loop
        first_token = tl.load(query_starts_ptr + sequence, volatile=True)
        query_len = tl.load(query_starts_ptr + sequence + 1, volatile=True) - first_token
        real = (rows < TILE_TOKENS * GROUP) & (query_tokens < query_len)
    # rows that only pad the tile may have seen nothing; they are not stored
    result = total * CODE_UNIT / tl.where(real, weight_sum, 1.0)[:, None]
    out_heads = (first_token + query_tokens).to(tl.int64) * tl.num_programs(1) * GROUP + heads
    out_offsets = out_heads[:, None] * HEAD_WIDTH + width[None, :]
    out_mask = real[:, None] & (width < HEAD_WIDTH)[None, :]
    tl.store(out_ptr + out_offsets, result.to(out_ptr.dtype.element_ty), mask=out_mask)


def prefill(operands: AttentionOperands, out: Tensor) -> None:
    """Attend the sequences with several new tokens, and leave the others' rows of out [T, H, D] alone."""
    query, layer, batch = operands.query, operands.layer, operands.batch
    width = query.shape[2]
    tile = prefill_tile(operands.arch, width, operands.group)
    tile_rows = row_tile(tile, operands.group)
    num_tiles = triton.cdiv(batch.max_query_len, tile_rows // operands.group)
    prefill_kernel[(num_tiles, layer.keys.shape[1], len(batch.context_lens))](
        query,
        operands.keys,
        operands.values,
        layer.key_scales,
        layer.value_scales,
        operands.sinks,
        batch.query_starts,
        batch.context_lens,
        batch.block_tables,
        out,
        query.stride(0),
        query.stride(1),
        batch.block_tables.stride(0),
        operands.score_scale,
        operands.soft_cap,
        operands.sliding_window,
        GROUP=operands.group,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        TILE_WIDTH=head_tile(width),
        TILE_ROWS=tile_rows,
        TILE_KEYS=tile.num_keys,
        CODES=operands.codes,
        CODE_UNIT=CODE_UNITS[operands.codes],
        INTERPRETED=IS_INTERPRETED,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.max_registers,
        enable_fp_fusion=FUSE_FLOATS,
    )
