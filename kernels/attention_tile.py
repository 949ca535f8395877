"""One step of attention's key loop, as jit functions: a tile of cached tokens against a tile of queries.

Decode keeps keys first: scores are [keys, R], and keys and values are the first operand of both products, so that their
rows fill the tensor cores and a group of query heads is padded to 8 and no further. Prefill keeps rows first: scores
are [R, keys], and weights stay in registers between the products.
Legend: D = head width, padded to a power of two; R = rows of the query tile.
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from kernels.attention_scores import above, approximate_log2, capped, finite, scale_and_add
from kernels.kv_words import split_words
from kernels.launch import operand


@triton.jit
def attend_tile(
    query: tl.tensor,
    query_high: tl.tensor,
    positions: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    block_slots: tl.tensor,
    score_scale: tl.tensor,
    soft_cap: tl.tensor,
    sliding_window: tl.tensor,
    total: tl.tensor,
    largest: tl.tensor,
    weight_sum: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CODES: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tuple:
    """TILE_KEYS tokens from `start` on join the online softmax. MASKED: some row does not see all of them.

    Returns the new total, largest exponents [R] and weight_sum: [R], or with keys first [TILE_KEYS, R], one sum for
    each place of the tile. What is outside first_key .. last_key is read as 0: its memory may hold anything, and 0
    times NaN is NaN.
    """
    KEY_AXIS: tl.constexpr = 0 if KEYS_FIRST else 1
    ROW_AXIS: tl.constexpr = 1 - KEY_AXIS
    WORDS: tl.constexpr = 1 if CODES is None else 2
    tokens = start + tl.arange(0, TILE_KEYS)
    inside = (tokens >= first_key) & (tokens < last_key)
    first, rows = find_rows(table_ptr, start, last_key, block_slots, TILE_KEYS, 1, BLOCK_SIZE)
    keys = load_rows(keys_ptr, first, rows, inside, HEAD_WIDTH // WORDS, TILE_WIDTH // WORDS, KEY_AXIS, MASKED)
    if CODES is None:
        scores = multiply(operand(keys, INTERPRETED), query, None, KEYS_FIRST)
    else:
        low, high = split_words(keys, CODES, INTERPRETED)
        scores = multiply(high, query_high, multiply(low, query, None, KEYS_FIRST), KEYS_FIRST)
        IS_CROWDED: tl.constexpr = TILE_WIDTH > 128 and not KEYS_FIRST
        key_scales = load_scales(key_scales_ptr, first, rows, inside, MASKED, IS_CROWDED)
        value_scales = load_scales(value_scales_ptr, first, rows, inside, MASKED, IS_CROWDED)
        scores *= tl.expand_dims(key_scales, ROW_AXIS)
    scores, score_scale = capped(scores, score_scale, soft_cap)
    if MASKED:
        token = tl.expand_dims(tokens, ROW_AXIS)
        position = tl.expand_dims(positions, KEY_AXIS)
        # one comparison: a token after the position is a large unsigned distance away
        distance = (position - token).to(tl.uint32, bitcast=True)
        scores = tl.where(distance < sliding_window.to(tl.uint32, bitcast=True), scores, float("-inf"))
    if CODES is None:
        bound = tl.max(scores, KEY_AXIS) * score_scale
    else:
        # weights times value scales are rounded to fp16: they, and not the weights alone, are to be at most about 1
        sizes = tl.expand_dims(approximate_log2(value_scales), ROW_AXIS)
        bound = tl.max(scale_and_add(scores, score_scale, sizes), KEY_AXIS)
    new_largest = tl.maximum(largest, bound)
    decay = above(largest, new_largest)
    weights = tl.exp2(scale_and_add(scores, score_scale, -finite(tl.expand_dims(new_largest, KEY_AXIS))))
    if KEYS_FIRST:
        weight_sum = tl.fma(weight_sum, tl.broadcast_to(decay[None, :], weight_sum.shape), weights)
    else:
        weight_sum = tl.fma(weight_sum, decay, tl.sum(weights, 1))
    total *= tl.expand_dims(decay, KEY_AXIS)
    if CODES is None:
        values = load_rows(values_ptr, first, rows, inside, HEAD_WIDTH, TILE_WIDTH, ROW_AXIS, MASKED)
        half_weights = operand(weights.to(values.dtype), INTERPRETED)
        total = multiply(operand(values, INTERPRETED), half_weights, total, KEYS_FIRST)
    else:
        half_weights = operand((weights * tl.expand_dims(value_scales, ROW_AXIS)).to(tl.float16), INTERPRETED)
        even_weights, odd_weights = split_pairs(half_weights, KEYS_FIRST)
        even, odd = load_values_in_pairs(
            values_ptr, table_ptr, start, first_key, last_key, block_slots,
            BLOCK_SIZE, HEAD_WIDTH, TILE_WIDTH, TILE_KEYS, CODES, ROW_AXIS, MASKED, INTERPRETED,
        )  # fmt: skip
        total = multiply(even, even_weights, total, KEYS_FIRST)
        total = multiply(odd, odd_weights, total, KEYS_FIRST)
    return total, new_largest, weight_sum


@triton.jit
def multiply(cached: tl.tensor, rows: tl.tensor, total: tl.tensor, KEYS_FIRST: tl.constexpr) -> tl.tensor:
    """What is cached times the rows, or the other way round, plus the total."""
    return tl.dot(cached, rows, total) if KEYS_FIRST else tl.dot(rows, cached, total)


@triton.jit
def find_rows(
    table_ptr: tl.tensor,
    start: tl.tensor,
    last_key: tl.tensor,
    block_slots: tl.tensor,
    NUM_ROWS: tl.constexpr,
    ROW_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tuple:
    """Where tokens start, start + 1, ... lie: first and rows [NUM_ROWS], first + rows being rows of the cache.

    The cache of a head is read as rows of ROW_TOKENS tokens; a block of all heads is block_slots tokens.
    """
    index = tl.arange(0, NUM_ROWS)
    if BLOCK_SIZE % (NUM_ROWS * ROW_TOKENS) == 0:
        # the whole tile is in one block: one read of the table, and offsets that no step computes again
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        first = (block * block_slots + start % BLOCK_SIZE) // ROW_TOKENS
        rows = index
    else:
        tokens = start + index * ROW_TOKENS
        blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < last_key, other=0).to(tl.int64)
        first = block_slots * 0
        rows = (blocks * block_slots + tokens % BLOCK_SIZE) // ROW_TOKENS
    return first, rows


@triton.jit
def load_rows(
    ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    ROW_AXIS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Rows first + rows of the cache, each WIDTH wide and padded with 0, along ROW_AXIS of the result."""
    width = tl.arange(0, TILE_WIDTH)
    columns = tl.expand_dims(width, ROW_AXIS)
    ptrs = ptr + first * WIDTH + tl.expand_dims(rows * WIDTH, 1 - ROW_AXIS) + columns
    in_rows = tl.expand_dims(inside, 1 - ROW_AXIS)
    if MASKED:
        tile = tl.load(ptrs, mask=in_rows & (columns < WIDTH), other=0)
    elif WIDTH < TILE_WIDTH:
        tile = tl.load(ptrs, mask=columns < WIDTH, other=0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_scales(
    ptr: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    inside: tl.tensor,
    MASKED: tl.constexpr,
    IS_CROWDED: tl.constexpr,
) -> tl.tensor:
    """The scales of rows first + rows; 1 outside. IS_CROWDED: whether no register is left to keep ptr + rows in."""
    ptrs = ptr + (first + rows) if IS_CROWDED else ptr + first + rows
    return tl.load(ptrs, mask=inside, other=1.0) if MASKED else tl.load(ptrs)


@triton.jit
def split_pairs(weights: tl.tensor, KEYS_FIRST: tl.constexpr) -> tl.tuple:
    """The weights of the even and of the odd tokens of a tile, each half as many."""
    if KEYS_FIRST:
        pairs = tl.permute(tl.reshape(weights, (weights.shape[0] // 2, 2, weights.shape[1])), (0, 2, 1))
    else:
        pairs = tl.reshape(weights, (weights.shape[0], weights.shape[1] // 2, 2))
    even, odd = tl.split(pairs)
    return even, odd


@triton.jit
def load_values_in_pairs(
    values_ptr: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    block_slots: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    CODES: tl.constexpr,
    PAIR_AXIS: tl.constexpr,
    MASKED: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tuple:
    """The values of the even and of the odd tokens of a tile, without their scales: fp16, pairs along PAIR_AXIS."""
    even_tokens = start + tl.arange(0, TILE_KEYS // 2) * 2
    first, rows = find_rows(table_ptr, start, last_key, block_slots, TILE_KEYS // 2, 2, BLOCK_SIZE)
    even_inside = (even_tokens >= first_key) & (even_tokens < last_key)
    odd_inside = (even_tokens + 1 >= first_key) & (even_tokens + 1 < last_key)
    inside = even_inside | odd_inside
    words = load_rows(values_ptr, first, rows, inside, HEAD_WIDTH, TILE_WIDTH, PAIR_AXIS, MASKED)
    low, high = split_words(words, CODES, INTERPRETED)
    if MASKED:
        # a word may be half outside, and what is there may be the code of NaN
        low = tl.where(tl.expand_dims(even_inside, 1 - PAIR_AXIS), low, 0.0)
        high = tl.where(tl.expand_dims(odd_inside, 1 - PAIR_AXIS), high, 0.0)
    return low, high
