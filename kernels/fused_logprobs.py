"""Log-probabilities of chosen tokens and of the likeliest ones, without a sort: Triton kernel and its checked wrapper.

Legend: S = rows, V = vocabulary.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import FUSE_FLOATS, launch_arch
from kernels.tiles import SAMPLED_COLUMNS, SAMPLING_WARPS


@triton.jit(do_not_specialize=["num_top"])
def logprobs_kernel(
    logits_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    chosen_logprobs_ptr: tl.tensor,
    top_ids_ptr: tl.tensor,
    top_logprobs_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab_size: tl.tensor,
    num_top: tl.tensor,
    TILE_COLUMNS: tl.constexpr,
    MAX_TILES: tl.constexpr,
) -> None:
    """Program (row): log-softmax of logits [S, V] at chosen int64 [S], and its num_top largest with their ids."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    lanes = tl.arange(0, TILE_COLUMNS)
    tiles = tl.arange(0, MAX_TILES)
    peaks = tl.full((MAX_TILES,), float("-inf"), tl.float32)
    for tile in range(tl.cdiv(vocab_size, TILE_COLUMNS)):
        index = tile * TILE_COLUMNS + lanes
        logits = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
        peaks = tl.where(tiles == tile, tl.max(logits), peaks)
    peak = tl.max(peaks)
    sums = tl.zeros((TILE_COLUMNS,), tl.float32)
    for first in range(0, vocab_size, TILE_COLUMNS):
        index = first + lanes
        logits = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
        sums += tl.exp(logits - peak)
    log_sum = tl.log(tl.sum(sums))
    chosen = tl.load(chosen_ptr + row)
    is_token = (chosen >= 0) & (chosen < vocab_size)
    chosen_logit = tl.load(row_ptr + tl.where(is_token, chosen, 0))
    tl.store(chosen_logprobs_ptr + row, tl.where(is_token, chosen_logit - peak - log_sum, float("nan")))
    # tokens come in order: largest logit first, of equal ones the smallest id first
    last_logit = float("inf")
    last_id = -1
    for rank in range(num_top):
        best = tl.max(peaks)
        tile = tl.min(tl.where(peaks == best, tiles, MAX_TILES - 1))
        index = tile * TILE_COLUMNS + lanes
        inside = index < vocab_size
        logits = tl.load(row_ptr + index, mask=inside, other=float("-inf"))
        is_left = inside & ((logits < last_logit) | ((logits == last_logit) & (index > last_id)))
        last_id = tl.min(tl.where(is_left & (logits == best), index, vocab_size))
        last_logit = best
        is_left = is_left & ((logits < best) | ((logits == best) & (index > last_id)))
        peaks = tl.where(tiles == tile, tl.max(tl.where(is_left, logits, float("-inf"))), peaks)
        found = last_id < vocab_size
        tl.store(top_ids_ptr + row * num_top + rank, tl.where(found, last_id, -1).to(tl.int64))
        tl.store(top_logprobs_ptr + row * num_top + rank, best - peak - log_sum)


def collect_logprobs(logits: Tensor, chosen: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under softmax of float32 logits [S, V]: of chosen int64 [S], and of the num_top likeliest.

    Returns float32 [S] (NaN where the chosen token is none), int64 [S, num_top] (likeliest first, the smaller id of
    equal ones first) and their float32 [S, num_top]. A row with NaN or inf gives NaN. Raises ValueError.
    """
    if logits.ndim != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 [S, V] with contiguous rows, not {logits.dtype} {list(logits.shape)}")
    num_rows, vocab_size = logits.shape
    if chosen.dtype != torch.int64 or chosen.shape != (num_rows,) or not chosen.is_contiguous():
        raise ValueError(f"chosen must be contiguous int64 [{num_rows}], not {chosen.dtype} {list(chosen.shape)}")
    if not 0 <= num_top <= vocab_size:
        raise ValueError(f"num_top must be from 0 to the {vocab_size} tokens of the vocabulary, not {num_top}")
    launch_arch({"logits": logits, "chosen": chosen})
    chosen_logprobs = torch.empty((num_rows,), dtype=torch.float32, device=logits.device)
    top_ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=logits.device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=logits.device)
    if num_rows > 0:
        logprobs_kernel[(num_rows,)](
            logits,
            chosen,
            chosen_logprobs,
            top_ids,
            top_logprobs,
            logits.stride(0),
            vocab_size,
            num_top,
            TILE_COLUMNS=SAMPLED_COLUMNS,
            MAX_TILES=triton.next_power_of_2(triton.cdiv(vocab_size, SAMPLED_COLUMNS)),
            num_warps=SAMPLING_WARPS,
            enable_fp_fusion=FUSE_FLOATS,
        )
    return chosen_logprobs, top_ids, top_logprobs
