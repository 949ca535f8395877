"""Sampling in plain torch, a row at a time, in float64: the definition that the fused kernels are tested against.

Legend: S = rows, V = vocabulary.
"""

import torch
from torch import Tensor

from kernels.counter_random import uniform
from kernels.sampling_batch import GREEDY_TEMPERATURE, MASK_BITS, NO_TOKEN, SamplingBatch


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """The token of each row of float32 logits [S, V], int64 [S]; NO_TOKEN where the edited logits are not finite."""
    edited = edit_logits(logits, batch)
    return torch.tensor([_sample_row(edited[row], batch, row) for row in range(len(logits))], dtype=torch.int64)


def edit_logits(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """float32 [S, V] with bias, then penalties, then the mask of what is allowed."""
    edited = logits.clone()
    for row in range(len(logits)):
        if batch.bias is not None:
            entries = slice(int(batch.bias.starts[row]), int(batch.bias.starts[row + 1]))
            edited[row].index_add_(0, batch.bias.token_ids[entries], batch.bias.values[entries])
        if batch.penalties is not None:
            penalties = batch.penalties
            tokens = penalties.token_ids[int(penalties.starts[row]) : int(penalties.starts[row + 1])]
            output_counts = tokens[int(penalties.num_prompt_tokens[row]) :].bincount(minlength=logits.shape[1])
            is_repeated = tokens.bincount(minlength=logits.shape[1]) > 0
            repetition = penalties.repetition[row]
            penalized = torch.where(edited[row] > 0, edited[row] / repetition, edited[row] * repetition)
            edited[row] = torch.where(is_repeated, penalized, edited[row])
            edited[row] -= penalties.frequency[row] * output_counts + penalties.presence[row] * (output_counts > 0)
        if batch.allowed is not None:
            bits = (batch.allowed[row][:, None] >> torch.arange(MASK_BITS)) & 1
            edited[row].masked_fill_(bits.flatten()[: logits.shape[1]] == 0, float("-inf"))
    return edited


def _sample_row(edited: Tensor, batch: SamplingBatch, row: int) -> int:
    if not edited.max().isfinite():
        return NO_TOKEN
    temperature = batch.temperatures[row]
    if temperature < GREEDY_TEMPERATURE:
        return int(edited.argmax())
    scaled = (edited / temperature).double()
    weights = (scaled - scaled.max()).exp()
    kept = weights.masked_fill(scaled < smallest_kept(scaled, weights, batch, row), 0.0)
    cumulative = kept.cumsum(0)
    target = uniform(int(batch.seeds[row]), int(batch.positions[row])) * cumulative[-1]
    return int(torch.searchsorted(cumulative, target, right=True))


def smallest_kept(scaled: Tensor, weights: Tensor, batch: SamplingBatch, row: int) -> Tensor:
    """The smallest logit that top-k, top-p of what top-k left, and min-p keep. What ties with it is kept too."""
    ranked, order = scaled.sort(descending=True, stable=True)
    top_k, top_p = int(batch.top_k[row]), float(batch.top_p[row])
    num_ranked = min(top_k, len(scaled)) if top_k > 0 else len(scaled)
    ranked, ranked_weights = ranked[:num_ranked], weights[order][:num_ranked]
    if top_p < 1:
        # a token is kept while what is likelier falls short of top-p
        before = ranked_weights.cumsum(0) - ranked_weights
        ranked = ranked[: max(int((before < top_p * ranked_weights.sum()).sum()), 1)]
    at_least = scaled.masked_fill(weights < batch.min_p[row], float("inf")).min()
    return torch.maximum(ranked[-1], at_least)


def collect_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of chosen int64 [S] float32 [S], and of the num_top likeliest: ids and values [S, num_top]."""
    logprobs = logits.double().log_softmax(dim=-1)
    values, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    return logprobs.gather(1, chosen[:, None])[:, 0].float(), ids[:, :num_top], values[:, :num_top].float()
