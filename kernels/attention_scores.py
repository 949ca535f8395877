"""Scores to exponents and weights, as jit functions that decode, its merge and prefill share.

A score becomes an exponent of two: scale and log2(e) in one product, so that a weight costs one exp2.
"""

# mypy: disable-error-code="untyped-decorator"

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def capped(scores: tl.tensor, score_scale: tl.tensor, soft_cap: tl.tensor) -> tl.tuple:
    """Scores and the positive factor that makes exponents of two of them.

    Without a cap both as they are, score_scale being the softmax scale times log2(e). With one, soft_cap is cap *
    log2(e) and score_scale twice log2(e) * softmax scale / cap: cap * tanh(x / cap), as tanh(x) = 1 - 2 / (exp(2 x) +
    1), which neither overflows nor loses a NaN.
    """
    if soft_cap is not None:
        scores = soft_cap - 2.0 * soft_cap / (tl.exp2(scores * score_scale) + 1.0)
        score_scale = tl.full((), 1.0, tl.float32)
    return scores, score_scale


@triton.jit
def scale_and_add(scores: tl.tensor, score_scale: tl.tensor, summand: tl.tensor) -> tl.tensor:
    """scores * score_scale + summand, rounded once."""
    factors = tl.broadcast_to(tl.zeros((), tl.float32) + score_scale, scores.shape)
    return tl.fma(scores, factors, tl.broadcast_to(summand, scores.shape))


@triton.jit
def finite(largest: tl.tensor) -> tl.tensor:
    """The largest exponents, 0 where there is none: where all scores are -inf, all weights are 0."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def above(exponents: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """exp2 of the exponents less their largest. 1 exactly where equal; 0 for -inf, also where all is -inf."""
    return tl.exp2(exponents - finite(largest))


@triton.jit
def approximate_log2(positive: tl.tensor) -> tl.tensor:
    """log2 of positive numbers, at most 0.09 too small: the bits of a float, read as an integer, grow with it."""
    # or-ed into the bits of 2**23, an integer below it is converted for nothing
    number = ((positive.to(tl.int32, bitcast=True) >> 8) | 0x4B000000).to(tl.float32, bitcast=True)
    return number * 0.000030517578125 - 383.0


@triton.jit
def power_of_two_below(sizes: tl.tensor) -> tl.tensor:
    """The power of two that leaves 1 to 2 of each size when divided by; infinity of infinity, a small number of 0."""
    bits = tl.maximum(sizes, 1.0e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)
