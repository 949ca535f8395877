"""Draws from a distribution at given uniform numbers: no generator, no state, no batch mates.

Legend: S = rows, V = vocabulary.
"""

import math

import torch
from torch import Tensor

from kernels.counter_random import UNIFORM_BITS

# wide enough that sums over blocks are few, narrow enough that one block is cheap
_LARGEST_BLOCK = 256


def draw(probs_SV: Tensor, uniforms_S: Tensor) -> Tensor:
    """The inverse of each row's cumulative distribution at its uniform number.

    probs_SV: float32 [S, V], rows need not sum to 1. uniforms_S: float64 [S] in [0, 1). Returns int64 [S]. A token of
    probability 0 is never drawn. In two levels, as a cumulative sum over a whole vocabulary is slow on a CPU. A row of
    NaN gives some token within range.
    """
    block = math.gcd(probs_SV.shape[1], _LARGEST_BLOCK)
    blocks = probs_SV.view(len(probs_SV), -1, block)
    masses = blocks.sum(dim=-1)
    block_index, fraction = _invert(masses, uniforms_S)
    chosen = blocks[torch.arange(len(blocks), device=blocks.device), block_index]
    return block_index * block + _invert(chosen, fraction)[0]


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the weight that each uniform number falls on, and how far into it, in [0, 1)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = (uniforms * cumulative[:, -1])[:, None]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index).double()
    fraction = 1 - (cumulative.gather(1, index) - target) / weight
    return index[:, 0], fraction[:, 0].clamp_(0, 1 - 2.0**-UNIFORM_BITS)


def row_argmax(logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of each row's largest element, int64 [S], and that element [S] (NaN where a row holds one).

    In two levels: a plain argmax over a vocabulary is ten times slower on a CPU than the maximum.
    """
    block = math.gcd(logits_SV.shape[1], _LARGEST_BLOCK)
    blocks = logits_SV.view(len(logits_SV), -1, block)
    peaks = blocks.amax(dim=-1)
    block_index = peaks.argmax(dim=-1)
    chosen = blocks[torch.arange(len(blocks), device=blocks.device), block_index]
    return block_index * block + chosen.argmax(dim=-1), peaks.gather(1, block_index[:, None])[:, 0]
