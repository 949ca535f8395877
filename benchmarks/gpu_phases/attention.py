"""Phase 4: attention over the paged cache beside torch's on contiguous tensors, which needs no table to find a key."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_phases.bench import Bench, Item, Side
from benchmarks.gpu_phases.datasheet import ATTENTION_BANDWIDTH_GOAL
from benchmarks.gpu_phases.figures import Cell, Figure, Goal
from benchmarks.gpu_phases.linear_sides import FASTEST_BYTES, FASTEST_FLOPS
from benchmarks.gpu_phases.machine import copy_bandwidth, data_sheet
from benchmarks.gpu_phases.operands import Sequences, batch_of, random_cache, random_rows
from benchmarks.gpu_phases.sizes import AttentionCase
from benchmarks.gpu_phases.stopwatch import Timing
from kernels.paged_attention import paged_attention

PHASE = "attention"
OURS, TORCH = "ours", "torch"
DTYPE = torch.float16
PEER_TABLE = "Peers that can be compared with"
FLASH, ANY_BACKEND = "torch flash attention", "torch attention"
# the largest difference of outputs near 1, in 16 bits
MAX_DIFFERENCE = 0.02


def plan(bench: Bench) -> Sequence[Item]:
    cases = [
        Item(f"{case}, blocks of {block_size}", partial(_measure, bench, case, block_size))
        for case in bench.sizes.attention
        for block_size in bench.sizes.block_sizes
    ]
    return [Item(name, partial(_check_torch, bench, name)) for name in (FLASH, ANY_BACKEND)] + cases


def _measure(bench: Bench, case: AttentionCase, block_size: int) -> Iterator[Figure]:
    sides = {OURS: _ours(bench, case, block_size)}
    peer = _usable_peer(bench)
    # a chunk after cached tokens is no mask that torch's fast kernels take
    if peer is not None and case.num_new in (1, case.context_len):
        sides[TORCH] = _torch(bench, case, peer)
    yield _figure(bench, case, block_size, bench.time(sides))


def kv_bytes(case: AttentionCase) -> int:
    """What has to be read of the cache."""
    tokens = case.num_sequences * case.context_len
    return 2 * tokens * case.heads.num_kv_heads * case.heads.width * DTYPE.itemsize


def _flops(case: AttentionCase) -> int:
    """Of the two products, over the keys that a token sees."""
    num_cached = case.context_len - case.num_new
    seen = case.num_new * num_cached + case.num_new * (case.num_new + 1) // 2
    return 4 * case.num_sequences * case.heads.num_heads * case.heads.width * seen


def _expected_seconds(case: AttentionCase) -> float:
    return kv_bytes(case) / FASTEST_BYTES + _flops(case) / FASTEST_FLOPS


def _ours(bench: Bench, case: AttentionCase, block_size: int) -> Side:
    sequences = Sequences(
        num_cached=(case.context_len - case.num_new,) * case.num_sequences,
        num_new=(case.num_new,) * case.num_sequences,
        block_size=block_size,
    )
    batch = batch_of(sequences, bench.device)
    query = random_rows(bench, (case.num_tokens, case.heads.num_heads, case.heads.width), DTYPE, seed=1)
    layers = [
        random_cache(bench, case.heads, sequences.num_blocks, block_size, DTYPE, seed=index)
        for index in range(bench.num_copies(kv_bytes(case)))
    ]
    scale = case.heads.width**-0.5
    return Side(
        [partial(paged_attention, query, layer, batch, softmax_scale=scale) for layer in layers],
        _expected_seconds(case),
    )


def _torch(bench: Bench, case: AttentionCase, backend: str) -> Side:
    heads = case.heads
    query = random_rows(bench, (case.num_sequences, heads.num_heads, case.num_new, heads.width), DTYPE, seed=1)
    shape = (case.num_sequences, heads.num_kv_heads, case.context_len, heads.width)
    calls = []
    for index in range(bench.num_copies(kv_bytes(case))):
        keys, values = (random_rows(bench, shape, DTYPE, seed=2 * index + part) for part in range(2))
        calls.append(partial(_attend_with_torch, query, keys, values, backend))
    return Side(calls, _expected_seconds(case))


def _attend_with_torch(query: Tensor, keys: Tensor, values: Tensor, backend: str) -> Tensor:
    """query [B, H, T, D] over keys and values [B, H_kv, L, D]: all of them for one token, causally for a prompt."""
    is_causal = query.shape[2] > 1
    if backend == FLASH:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, is_causal=is_causal, enable_gqa=True
            )
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=is_causal, enable_gqa=True)


def _check_torch(bench: Bench, backend: str) -> Iterator[Figure]:
    """Whether torch's attention runs here so, and gives what ours gives, for a token and for a prompt."""
    largest = 0.0
    for case in (bench.sizes.attention[0], _prompt_of(bench)):
        heads, length = case.heads, case.context_len
        sequences = Sequences((length - case.num_new,), (case.num_new,), bench.sizes.block_sizes[0])
        batch = batch_of(sequences, bench.device)
        layer = random_cache(bench, heads, sequences.num_blocks, sequences.block_size, DTYPE, seed=1)
        query = random_rows(bench, (case.num_new, heads.num_heads, heads.width), DTYPE, seed=3)
        ours = paged_attention(query, layer, batch, softmax_scale=heads.width**-0.5)
        blocks = batch.block_tables[0].long()
        # [blocks, H_kv, size, D] to [1, H_kv, L, D]
        keys, values = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[None, :, :length].contiguous()
            for cache in (layer.keys, layer.values)
        )
        theirs = _attend_with_torch(query.transpose(0, 1)[None].contiguous(), keys, values, backend)
        largest = max(largest, float((ours.float() - theirs[0].transpose(0, 1).float()).abs().max()))
    yield Figure(PEER_TABLE, backend, {"largest difference": largest, "usable": largest < MAX_DIFFERENCE})


def _prompt_of(bench: Bench) -> AttentionCase:
    return next(case for case in bench.sizes.attention if case.num_new == case.context_len)


def _usable_peer(bench: Bench) -> str | None:
    usable = [figure.name for figure in bench.findings.of(PHASE) if figure.values.get("usable") is True]
    return usable[0] if usable else None


def _figure(bench: Bench, case: AttentionCase, block_size: int, timings: dict[str, Timing]) -> Figure:
    ours = timings[OURS]
    io_bytes = 2 * case.num_tokens * case.heads.num_heads * case.heads.width * DTYPE.itemsize
    bandwidth = (kv_bytes(case) + io_bytes) / ours.median
    share = bandwidth / copy_bandwidth(bench)
    sheet = data_sheet(bench)
    is_decode = case.num_new == 1
    theirs = timings[TORCH].median if TORCH in timings else None
    values: dict[str, Cell] = {
        "block": block_size,
        "ours us": 1e6 * ours.median,
        "p10": 1e6 * ours.p10,
        "p90": 1e6 * ours.p90,
        "torch us": None if theirs is None else 1e6 * theirs,
        "torch / ours": None if theirs is None else theirs / ours.median,
        "GB/s": bandwidth / 1e9 if is_decode else None,
        "% of copy": 100 * share if is_decode else None,
        "% of datasheet": 100 * bandwidth / sheet.bytes_per_second if sheet is not None and is_decode else None,
        "TFLOP/s": None if is_decode else _flops(case) / ours.median / 1e12,
    }
    goals = (Goal("share of copy bandwidth", share, ATTENTION_BANDWIDTH_GOAL),) if is_decode else ()
    return Figure("Attention", str(case), values, goals)
