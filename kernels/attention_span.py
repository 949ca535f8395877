"""The key loops of decode and prefill, as jit functions: online softmax over cached tokens, tile by tile.

Legend: D = head width, padded to a power of two; R = rows of the query tile.
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from kernels.attention_tile import attend_tile


@triton.jit
def attend_span(
    query: tl.tensor,
    query_high: tl.tensor,
    position: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    block_slots: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    sliding_window: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CODES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tuple:
    """Attention of one token's query heads over the tokens first_key .. last_key of its sequence, all of them seen.

    query [D, R]; for codes, query holds the even elements of a head and query_high the odd ones [D / 2, R]. Pointers
    are to the head's part of block 0. score_scale: [1, R] or a number, see `capped`. Returns the weighted sum
    [D, R], the largest exponent [R] and the sum of weights [R].
    """
    positions = tl.zeros((TILE_ROWS,), tl.int32) + position
    total = tl.zeros((TILE_WIDTH, TILE_ROWS), tl.float32)
    largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    # one for each place of the tile, added up after the loop
    weight_sums = tl.zeros((TILE_KEYS, TILE_ROWS), tl.float32)
    first_tile = first_key // TILE_KEYS
    last_tile = (last_key - 1) // TILE_KEYS
    cuts_first = first_key % TILE_KEYS != 0
    cuts_last = (last_key % TILE_KEYS != 0) & ((first_tile != last_tile) | (first_key % TILE_KEYS == 0))
    # the tiles that the ends of the span cut come first, masked; those between are read whole
    for edge in range(cuts_first.to(tl.int32) + cuts_last.to(tl.int32)):
        tile = tl.where((edge == 0) & cuts_first, first_tile, last_tile)
        total, largest, weight_sums = attend_tile(
            query, query_high, positions, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
            tile * TILE_KEYS, first_key, last_key, block_slots, score_scale, soft_cap, sliding_window,
            total, largest, weight_sums,
            BLOCK_SIZE, HEAD_WIDTH, TILE_WIDTH, TILE_KEYS, CODES,
            KEYS_FIRST=True, MASKED=True, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    first_whole = tl.cdiv(first_key, TILE_KEYS) * TILE_KEYS
    for start in range(first_whole, last_key // TILE_KEYS * TILE_KEYS, TILE_KEYS):
        total, largest, weight_sums = attend_tile(
            query, query_high, positions, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
            start, first_key, last_key, block_slots, score_scale, soft_cap, sliding_window,
            total, largest, weight_sums,
            BLOCK_SIZE, HEAD_WIDTH, TILE_WIDTH, TILE_KEYS, CODES,
            KEYS_FIRST=True, MASKED=False, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return total, largest, tl.sum(weight_sums, 0)


@triton.jit
def attend_rows(
    query: tl.tensor,
    query_high: tl.tensor,
    positions: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first_key: tl.tensor,
    num_seen_by_all: tl.tensor,
    last_key: tl.tensor,
    block_slots: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    sliding_window: tl.tensor,
    largest: tl.tensor,
    weight_sum: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CODES: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tuple:
    """Attention of query [R, D] at positions [R] over the tokens first_key .. last_key of their sequence.

    Every row sees the first num_seen_by_all tokens of the sequence. largest and weight_sum [R]: of what has weight
    beside the tokens. Else as in `attend_span`, rows first. Returns the weighted sum [R, D] and the sum of weights [R].

    Tiles start at multiples of their size and come in order, whatever the rows of the tile, so that a token's sums are
    the same in every chunk of its prompt.
    """
    total = tl.zeros((TILE_ROWS, TILE_WIDTH), tl.float32)
    first_start = first_key // TILE_KEYS * TILE_KEYS
    # with a window no tile is certain to be seen whole: all are masked
    first_masked = tl.maximum(num_seen_by_all // TILE_KEYS * TILE_KEYS, first_start)
    for start in range(first_start, first_masked, TILE_KEYS):
        total, largest, weight_sum = attend_tile(
            query, query_high, positions, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
            start, first_key, last_key, block_slots, score_scale, soft_cap, sliding_window,
            total, largest, weight_sum,
            BLOCK_SIZE, HEAD_WIDTH, TILE_WIDTH, TILE_KEYS, CODES,
            KEYS_FIRST=False, MASKED=False, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    for start in range(first_masked, last_key, TILE_KEYS):
        total, largest, weight_sum = attend_tile(
            query, query_high, positions, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, table_ptr,
            start, first_key, last_key, block_slots, score_scale, soft_cap, sliding_window,
            total, largest, weight_sum,
            BLOCK_SIZE, HEAD_WIDTH, TILE_WIDTH, TILE_KEYS, CODES,
            KEYS_FIRST=False, MASKED=True, INTERPRETED=INTERPRETED,
        )  # fmt: skip
    return total, weight_sum
