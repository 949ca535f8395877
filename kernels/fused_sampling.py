"""The next token of every row, chosen on the device: Triton kernels and their checked wrapper.

Two launches a step: the logits are edited and scaled, all programs sharing the work; then one program a row finds the
largest, top-k's and top-p's thresholds and the token that the row's random number falls on. No vocabulary is sorted: a
threshold is searched by halving the range of floating-point numbers that may hold it. A row's token depends on the
row alone. Legend: S = rows, V = vocabulary.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.counter_random import FIRST_MULTIPLIER, GOLDEN_GAMMA, SECOND_MULTIPLIER, UNIFORM_BITS
from kernels.fused_logit_edits import edit_logits
from kernels.launch import FUSE_FLOATS, launch_arch
from kernels.sampling_batch import GREEDY_TEMPERATURE, NO_TOKEN, SamplingBatch
from kernels.tiles import NUM_THRESHOLDS, SAMPLED_COLUMNS, SAMPLING_WARPS

GREEDY = tl.constexpr(GREEDY_TEMPERATURE)
NOTHING = tl.constexpr(NO_TOKEN)
GAMMA = tl.constexpr(GOLDEN_GAMMA)
FIRST = tl.constexpr(FIRST_MULTIPLIER)
SECOND = tl.constexpr(SECOND_MULTIPLIER)
SIGN_BIT = tl.constexpr(-(2**31))
UNUSED_BITS = tl.constexpr(64 - UNIFORM_BITS)
UNIFORM_STEP = tl.constexpr(2.0**-UNIFORM_BITS)


@triton.jit
def choose_tokens_kernel(
    scaled_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
    NUM_THRESHOLDS: tl.constexpr,
) -> None:
    """Program (row): the token, int64, of edited and scaled logits [S, V] with rows row_stride apart."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = scaled_ptr + row * row_stride
    peak, lowest, token = row_extremes(row_ptr, vocab_size, TILE_COLUMNS)
    if (token >= 0) & (tl.load(temperatures_ptr + row) >= GREEDY):
        low = ordered_bits(lowest).to(tl.int64) - 1
        high = ordered_bits(peak).to(tl.int64)
        top_k = tl.load(top_k_ptr + row)
        if (top_k > 0) & (top_k < vocab_size):
            # with a sharpness of 0 every token weighs 1, and weights are counts
            low = search(row_ptr, low, high, peak, 0.0, top_k.to(tl.float64), vocab_size, TILE_COLUMNS, NUM_THRESHOLDS)
        else:
            top_k = vocab_size
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            wanted = top_p * kept_mass(row_ptr, low, peak, top_k, vocab_size, TILE_COLUMNS)
            low = search(row_ptr, low, high, peak, 1.0, wanted, vocab_size, TILE_COLUMNS, NUM_THRESHOLDS)
        uniform = uniform_number(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        floor = ordered_number(low.to(tl.int32))
        token = draw(row_ptr, floor, peak, tl.load(min_p_ptr + row), uniform, vocab_size, TILE_COLUMNS)
    tl.store(tokens_ptr + row, token.to(tl.int64))


@triton.jit
def row_extremes(row_ptr: tl.tensor, vocab_size: tl.tensor, TILE_COLUMNS: tl.constexpr) -> tl.tuple:
    """The largest logit, the smallest but -inf, and the first index of the largest.

    The index is NOTHING if a logit is NaN or inf, or all are -inf.
    """
    lanes = tl.arange(0, TILE_COLUMNS)
    largest = tl.full((TILE_COLUMNS,), float("-inf"), tl.float32)
    smallest = tl.full((TILE_COLUMNS,), float("inf"), tl.float32)
    largest_index = tl.zeros((TILE_COLUMNS,), tl.int32)
    num_bad = tl.zeros((TILE_COLUMNS,), tl.int32)
    for first in range(0, vocab_size, TILE_COLUMNS):
        index = first + lanes
        values = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
        num_bad += ((values != values) | (values == float("inf"))).to(tl.int32)
        largest_index = tl.where(values > largest, index, largest_index)
        largest = tl.where(values > largest, values, largest)
        smallest = tl.where((values > float("-inf")) & (values < smallest), values, smallest)
    peak = tl.max(largest)
    token = tl.min(tl.where(largest == peak, largest_index, vocab_size))
    is_good = (tl.sum(num_bad) == 0) & (peak > float("-inf"))
    return peak, tl.min(smallest), tl.where(is_good, token, NOTHING)


@triton.jit
def ordered_bits(number: tl.tensor) -> tl.tensor:
    """int32 that is ordered as the float32 numbers are, 0 for both zeros; `ordered_number` takes it back."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def ordered_number(bits: tl.tensor) -> tl.tensor:
    """The float32 number of `ordered_bits`."""
    return tl.where(bits < 0, -bits | SIGN_BIT, bits).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(logits: tl.tensor, peak: tl.tensor, sharpness: tl.tensor) -> tl.tensor:
    """exp of the logits less the largest, raised to the sharpness; 0 for -inf."""
    return tl.where(logits > float("-inf"), tl.exp((logits - peak) * sharpness), 0.0)


@triton.jit
def search(
    row_ptr: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    peak: tl.tensor,
    sharpness: tl.tensor,
    wanted: tl.tensor,
    vocab_size: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
    NUM_THRESHOLDS: tl.constexpr,
) -> tl.tensor:
    """The ordered bits that all kept logits are above: those that the logits above weigh less than `wanted` are kept.

    low, high: int64, ordered bits; logits above low weigh at least `wanted`, as far as there are any, and those above
    high less. The range is cut into NUM_THRESHOLDS parts a pass, until it holds one logit or one number.
    """
    lanes = tl.arange(0, TILE_COLUMNS)
    parts = tl.arange(0, NUM_THRESHOLDS)
    # of the logits above low; before the first that is counted, as many as there may be
    num_above = vocab_size
    num_inside = vocab_size
    while (high - low > 1) & (num_inside > 1):
        step = (high - low + NUM_THRESHOLDS - 1) // NUM_THRESHOLDS
        borders = tl.minimum(low + (parts + 1) * step, high)
        thresholds = ordered_number(borders.to(tl.int32))[:, None]
        weights = tl.zeros((NUM_THRESHOLDS, TILE_COLUMNS), tl.float32)
        counts = tl.zeros((NUM_THRESHOLDS, TILE_COLUMNS), tl.int32)
        for first in range(0, vocab_size, TILE_COLUMNS):
            index = first + lanes
            logits = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
            is_above = logits[None, :] > thresholds
            weights += tl.where(is_above, weight_of(logits, peak, sharpness)[None, :], 0.0)
            counts += is_above.to(tl.int32)
        above = tl.sum(counts, 1)
        is_enough = (tl.sum(weights, 1).to(tl.float64) >= wanted) & (borders < high)
        num_enough = tl.sum(is_enough.to(tl.int32))
        num_above = tl.where(num_enough > 0, tl.sum(tl.where(parts == num_enough - 1, above, 0)), num_above)
        num_inside = num_above - tl.sum(tl.where(parts == num_enough, above, 0))
        high = tl.minimum(low + (num_enough + 1) * step, high)
        low = low + num_enough * step
    return low


@triton.jit
def kept_mass(
    row_ptr: tl.tensor,
    low: tl.tensor,
    peak: tl.tensor,
    top_k: tl.tensor,
    vocab_size: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """What the logits above the ordered bits `low` weigh together, float64.

    Of ties at top-k's border only so many count that there are top_k logits.
    """
    lanes = tl.arange(0, TILE_COLUMNS)
    floor = ordered_number(low.to(tl.int32))
    weights = tl.zeros((TILE_COLUMNS,), tl.float32)
    counts = tl.zeros((TILE_COLUMNS,), tl.int32)
    smallest = tl.full((TILE_COLUMNS,), float("inf"), tl.float32)
    for first in range(0, vocab_size, TILE_COLUMNS):
        index = first + lanes
        logits = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
        is_above = logits > floor
        weights += tl.where(is_above, weight_of(logits, peak, 1.0), 0.0)
        counts += is_above.to(tl.int32)
        smallest = tl.where(is_above & (logits < smallest), logits, smallest)
    num_too_many = tl.maximum(tl.sum(counts) - top_k, 0)
    tie_weight = weight_of(tl.min(smallest), peak, 1.0)
    return tl.sum(weights).to(tl.float64) - num_too_many.to(tl.float64) * tie_weight.to(tl.float64)


@triton.jit
def kept_weights(
    row_ptr: tl.tensor, index: tl.tensor, floor: tl.tensor, peak: tl.tensor, min_p: tl.tensor, vocab_size: tl.tensor
) -> tl.tensor:
    """The weights of the tokens `index`: 0 for those at or below the floor, or below min_p times the largest."""
    logits = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
    weights = weight_of(logits, peak, 1.0)
    return tl.where((logits > floor) & (weights >= min_p), weights, 0.0)


@triton.jit
def draw(
    row_ptr: tl.tensor,
    floor: tl.tensor,
    peak: tl.tensor,
    min_p: tl.tensor,
    uniform: tl.tensor,
    vocab_size: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The inverse of the kept tokens' cumulative distribution at the uniform number: an index, int32."""
    lanes = tl.arange(0, TILE_COLUMNS)
    total = tl.cast(0.0, tl.float64)
    for first in range(0, vocab_size, TILE_COLUMNS):
        total += tl.sum(kept_weights(row_ptr, first + lanes, floor, peak, min_p, vocab_size)).to(tl.float64)
    # the same sums again, as far as the tile that holds the target: target < total, so there is one, and it weighs
    target = total * uniform
    first_of_tile = 0
    weights = kept_weights(row_ptr, lanes, floor, peak, min_p, vocab_size)
    below = tl.cast(0.0, tl.float64)
    mass = tl.sum(weights).to(tl.float64)
    while (below + mass <= target) & (first_of_tile + TILE_COLUMNS < vocab_size):
        below += mass
        first_of_tile += TILE_COLUMNS
        weights = kept_weights(row_ptr, first_of_tile + lanes, floor, peak, min_p, vocab_size)
        mass = tl.sum(weights).to(tl.float64)
    cumulative = below + tl.cumsum(weights.to(tl.float64), 0)
    is_kept = weights > 0.0
    index = tl.min(tl.where(is_kept & (cumulative > target), lanes, TILE_COLUMNS))
    # rounding may leave the target beyond the last sum of its tile
    last = tl.max(tl.where(is_kept, lanes, 0))
    return first_of_tile + tl.where(index < TILE_COLUMNS, index, last)


@triton.jit
def uniform_number(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """`kernels.counter_random.uniform` of int64 scalars: float64 in [0, 1)."""
    word = mixed(mixed(seed.to(tl.uint64)) ^ (position.to(tl.uint64) * GAMMA))
    return (word >> UNUSED_BITS).to(tl.float64) * UNIFORM_STEP


@triton.jit
def mixed(word: tl.tensor) -> tl.tensor:
    """One step of SplitMix64 on uint64."""
    word = word + GAMMA
    word = (word ^ (word >> 30)) * FIRST
    word = (word ^ (word >> 27)) * SECOND
    return word ^ (word >> 31)


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The token of each row of float32 logits [S, V], int64 [S]; NO_TOKEN where the edited logits are not finite.

    Bias, penalties, mask, temperature, top-k, top-p of what top-k left, min-p, then the draw; greedy rows take the
    first of the largest. A threshold keeps all tokens that tie with the last one kept. Raises ValueError for operands
    that do not fit.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 [S, V] with contiguous rows, not {logits.dtype} {list(logits.shape)}")
    num_rows, vocab_size = logits.shape
    launch_arch({"logits": logits, **batch.check(num_rows, vocab_size)})
    tokens = torch.empty((num_rows,), dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return tokens
    scaled = edit_logits(logits, batch)
    choose_tokens_kernel[(num_rows,)](
        scaled,
        batch.temperatures,
        batch.top_k,
        batch.top_p,
        batch.min_p,
        batch.seeds,
        batch.positions,
        tokens,
        scaled.stride(0),
        vocab_size,
        TILE_COLUMNS=SAMPLED_COLUMNS,
        NUM_THRESHOLDS=NUM_THRESHOLDS,
        num_warps=SAMPLING_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return tokens
