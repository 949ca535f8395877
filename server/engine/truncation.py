"""Top-k, top-p and min-p: which tokens stay possible. Each is a threshold on a row's probabilities.

A threshold keeps every token that ties with the last one kept, so the result depends on no sort order.
Legend: S = rows, V = vocabulary, C = candidates, the likeliest tokens of a row in descending order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.request import SamplingParams

# the nucleus of a language model is nearly always among the first few; sorting a whole vocabulary is slow on a CPU
_CPU_CANDIDATES = (128, 2048)
_SORTED_BLOCK = 32


def truncate(probs_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """probs_SV float32 [S, V] with 0 for what top-k, top-p (of what top-k left) and min-p exclude. Not renormalised."""
    vocab_size = probs_SV.shape[1]
    ranked = [index for index, p in enumerate(params) if 0 < p.top_k < vocab_size or p.top_p < 1]
    floored = [index for index, p in enumerate(params) if p.min_p > 0]
    if not ranked and not floored:
        return probs_SV
    thresholds = torch.zeros(len(params))
    if floored:
        factors = torch.tensor([params[index].min_p for index in floored])
        thresholds[floored] = factors * probs_SV[floored].amax(dim=-1)
    if ranked:
        ranked_probs = probs_SV if len(ranked) == len(params) else probs_SV[ranked]
        rank_thresholds = _rank_thresholds(ranked_probs, [params[index] for index in ranked])
        thresholds[ranked] = torch.maximum(thresholds[ranked], rank_thresholds)
    return torch.where(probs_SV >= thresholds[:, None], probs_SV, 0.0)


def _rank_thresholds(probs_SV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The smallest probability that top-k and top-p keep, float32 [S]."""
    num_rows, vocab_size = probs_SV.shape
    top_k = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params])
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64)
    thresholds = torch.empty(num_rows)
    left = torch.arange(num_rows)
    for num_candidates in (*(size for size in _CPU_CANDIDATES if size < vocab_size), vocab_size):
        candidates = _largest(probs_SV if len(left) == num_rows else probs_SV[left], num_candidates)
        found = _thresholds_among(candidates, top_k[left], top_p[left])
        # mass that top-k excludes is known once all of top-k is seen; without top-k the whole row's is 1
        is_settled = found.saw_all_of_top_k | ((top_k[left] == vocab_size) & found.reached_top_p)
        thresholds[left[is_settled]] = found.thresholds[is_settled]
        left = left[~is_settled]
        if len(left) == 0:
            break
    return thresholds


def _largest(probs_SV: Tensor, num_candidates: int) -> Tensor:
    """Each row's largest elements in descending order, float32 [S, num_candidates].

    They lie in the num_candidates blocks with the largest maxima, so the others need no sorting.
    """
    block = math.gcd(probs_SV.shape[1], _SORTED_BLOCK)
    if num_candidates * block < probs_SV.shape[1]:
        blocks = probs_SV.view(len(probs_SV), -1, block)
        index = blocks.amax(dim=-1).topk(num_candidates, dim=-1, sorted=False).indices
        probs_SV = blocks.gather(1, index[:, :, None].expand(-1, -1, block)).flatten(1)
    return probs_SV.topk(num_candidates, dim=-1).values


@dataclass(frozen=True)
class _Ranking:
    """Per row: the threshold, and whether the candidates were enough to know it."""

    thresholds: Tensor
    saw_all_of_top_k: Tensor
    reached_top_p: Tensor


def _thresholds_among(candidates_SC: Tensor, top_k_S: Tensor, top_p_S: Tensor) -> _Ranking:
    num_candidates = candidates_SC.shape[1]
    ranks = torch.arange(num_candidates, device=candidates_SC.device)
    kept = torch.where(ranks < top_k_S[:, None], candidates_SC.double(), 0.0)
    cumulative = kept.cumsum(dim=-1)
    saw_all_of_top_k = top_k_S <= num_candidates
    wanted = top_p_S * torch.where(saw_all_of_top_k, cumulative[:, -1], 1.0)
    # a sum that rounds to the whole mass early must not cut the tail where top-p is off
    is_kept = (kept > 0) & ((cumulative - kept < wanted[:, None]) | (top_p_S[:, None] >= 1))
    num_kept = is_kept.sum(dim=-1).clamp_(min=1)
    thresholds = candidates_SC.gather(1, num_kept[:, None] - 1)[:, 0]
    return _Ranking(thresholds, saw_all_of_top_k, cumulative[:, -1] >= wanted)
