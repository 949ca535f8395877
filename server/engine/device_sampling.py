"""Sampling rows to the operands of the sampling kernels, for logits on a device with Triton kernels.

Legend: S = rows, V = vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.fused_sampling import sample
from kernels.sampling_batch import LogitBias, Penalties, SamplingBatch
from server.engine.logit_edits import has_penalty
from server.engine.step_plan import SamplingRow
from server.engine.step_tensors import copy_to_device


def choose_tokens(logits_SV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The token of each row of float32 logits [S, V], int64 [S] on their device; NO_TOKEN where they are not finite."""
    return sample(logits_SV, build_batch(rows, logits_SV.device))


def build_batch(rows: Sequence[SamplingRow], device: torch.device) -> SamplingBatch:
    """The operands of these rows. What no row asks for is None, and costs the kernels nothing."""
    params = [row.params for row in rows]
    return SamplingBatch(
        temperatures=copy_to_device(np.array([p.temperature for p in params], dtype=np.float32), device),
        top_k=copy_to_device(np.array([p.top_k for p in params], dtype=np.int32), device),
        top_p=copy_to_device(np.array([p.top_p for p in params], dtype=np.float64), device),
        min_p=copy_to_device(np.array([p.min_p for p in params], dtype=np.float32), device),
        # a seed is 64 bits, with or without a sign
        seeds=copy_to_device(np.array([p.seed & (2**64 - 1) for p in params], dtype=np.uint64).view(np.int64), device),
        positions=copy_to_device(np.array([row.position for row in rows], dtype=np.int64), device),
        penalties=_build_penalties(rows, device) if any(has_penalty(p) for p in params) else None,
        bias=_build_bias(rows, device),
        allowed=_build_masks(rows, device),
    )


def _build_penalties(rows: Sequence[SamplingRow], device: torch.device) -> Penalties:
    params = [row.params for row in rows]
    nothing = np.empty(0, dtype=np.int64)
    texts = [row.token_ids if has_penalty(row.params) else nothing for row in rows]
    return Penalties(
        repetition=copy_to_device(np.array([p.repetition_penalty for p in params], dtype=np.float32), device),
        presence=copy_to_device(np.array([p.presence_penalty for p in params], dtype=np.float32), device),
        frequency=copy_to_device(np.array([p.frequency_penalty for p in params], dtype=np.float32), device),
        token_ids=copy_to_device(np.concatenate(texts), device),
        starts=copy_to_device(_starts([len(text) for text in texts]), device),
        num_prompt_tokens=copy_to_device(np.array([row.num_prompt_tokens for row in rows], dtype=np.int64), device),
        max_tokens=max(len(text) for text in texts),
    )


def _build_bias(rows: Sequence[SamplingRow], device: torch.device) -> LogitBias | None:
    """Biases, and -inf for stop tokens that are still barred; None where there is neither."""
    entries = [
        [*row.params.logit_bias, *((token, float("-inf")) for token in row.params.stop_token_ids)]
        if row.bars_stop_tokens
        else row.params.logit_bias
        for row in rows
    ]
    if not any(entries):
        return None
    flat = [entry for row_entries in entries for entry in row_entries]
    return LogitBias(
        starts=copy_to_device(_starts([len(row_entries) for row_entries in entries]).astype(np.int32), device),
        token_ids=copy_to_device(np.array([token for token, _ in flat], dtype=np.int64), device),
        values=copy_to_device(np.array([value for _, value in flat], dtype=np.float32), device),
    )


def _build_masks(rows: Sequence[SamplingRow], device: torch.device) -> Tensor | None:
    """What each row allows, all where it says nothing; None where no row says anything."""
    masks = [(index, row.allowed) for index, row in enumerate(rows) if row.allowed is not None]
    if not masks:
        return None
    words = np.full((len(rows), len(masks[0][1])), -1, dtype=np.int32)
    for index, mask in masks:
        words[index] = mask
    return copy_to_device(words, device)


def _starts(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *lengths], dtype=np.int64)
