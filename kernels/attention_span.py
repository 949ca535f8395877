"""The key loop that decode and prefill attention share, as a jit function: online softmax over cached tokens.

Legend: R = rows of a tile, each one (token, query head); D = head width, padded to a power of two.
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from kernels.launch import operand


@triton.jit
def above(scores: tl.tensor, largest: tl.tensor, exponent_scale: tl.tensor) -> tl.tensor:
    """exp of the scaled scores less their largest. 1 exactly where equal; 0 for -inf, also where all is -inf."""
    return tl.exp2((scores - tl.where(largest == float("-inf"), 0.0, largest)) * exponent_scale)


@triton.jit
def attend_span(
    query: tl.tensor,
    positions: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    table_ptr: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    block_stride: tl.tensor,
    exponent_scale: tl.tensor,
    sliding_window: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tuple:
    """Attention of query [R, D] at positions [R] over the cached tokens first_key .. last_key of one sequence.

    keys, values: the head's [BLOCK_SIZE, D] in block 0; blocks are block_stride apart. exponent_scale: the softmax
    scale times log2(e). Returns the weighted sum [R, D], the largest unscaled score [R] and the sum of weights [R];
    0, -inf and 0 where a row sees nothing.
    """
    width = tl.arange(0, TILE_WIDTH)
    total = tl.zeros((TILE_ROWS, TILE_WIDTH), tl.float32)
    largest = tl.full((TILE_ROWS,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((TILE_ROWS,), tl.float32)
    # tiles start at multiples of their size whatever the window, so that a token is always in the same tile
    for start in range(first_key // TILE_KEYS * TILE_KEYS, last_key, TILE_KEYS):
        tokens = tl.arange(0, TILE_KEYS) + start
        # what is outside is read as 0: its memory may hold anything, and 0 times NaN is NaN
        inside = (tokens >= first_key) & (tokens < last_key)
        if BLOCK_SIZE % TILE_KEYS == 0:
            # the whole tile is in one block: one read of the table
            blocks = tl.load(table_ptr + start // BLOCK_SIZE)
        else:
            blocks = tl.load(table_ptr + tokens // BLOCK_SIZE, mask=inside, other=0)
        offsets = blocks.to(tl.int64) * block_stride + (tokens % BLOCK_SIZE) * HEAD_WIDTH
        key_mask = inside[None, :] & (width < HEAD_WIDTH)[:, None]
        keys = tl.load(keys_ptr + offsets[None, :] + width[:, None], mask=key_mask, other=0.0)
        scores = tl.dot(operand(query, INTERPRETED), operand(keys, INTERPRETED))
        visible = (tokens[None, :] <= positions[:, None]) & (tokens[None, :] > positions[:, None] - sliding_window)
        scores = tl.where(visible & inside[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = above(scores, new_largest[:, None], exponent_scale)
        decay = above(largest, new_largest, exponent_scale)
        value_mask = inside[:, None] & (width < HEAD_WIDTH)[None, :]
        values = tl.load(values_ptr + offsets[:, None] + width[None, :], mask=value_mask, other=0.0)
        half_weights = operand(weights.to(values.dtype), INTERPRETED)
        total = tl.dot(half_weights, operand(values, INTERPRETED), total * decay[:, None])
        weight_sum = tl.fma(weight_sum, decay, tl.sum(weights, 1))
        largest = new_largest
    return total, largest, weight_sum
