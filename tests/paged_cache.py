"""Builds paged caches and the batches over them for tests of attention, the decoder and the engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_batch import AttentionBatch, PagedLayer


@dataclass(frozen=True)
class Chunk:
    """The part of a sequence that a step runs: `num_new` tokens after `num_cached` that are in the cache."""

    blocks: Sequence[int]
    num_cached: int
    num_new: int


def build_batch(chunks: Sequence[Chunk], block_size: int) -> AttentionBatch:
    """The batch of one step over these chunks, in their order."""
    context_lens = [chunk.num_cached + chunk.num_new for chunk in chunks]
    max_blocks = max(len(chunk.blocks) for chunk in chunks)
    starts = torch.tensor([0, *(chunk.num_new for chunk in chunks)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return AttentionBatch(
        query_starts=starts,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=torch.tensor(
            [[*chunk.blocks, *[0] * (max_blocks - len(chunk.blocks))] for chunk in chunks], dtype=torch.int32
        ),
        slot_mapping=torch.tensor(
            [
                chunk.blocks[position // block_size] * block_size + position % block_size
                for chunk, context_len in zip(chunks, context_lens, strict=True)
                for position in range(chunk.num_cached, context_len)
            ],
            dtype=torch.int64,
        ),
        max_query_len=max(chunk.num_new for chunk in chunks),
        max_context_len=max(context_lens),
    )


def build_positions(chunks: Sequence[Chunk]) -> Tensor:
    """The position of every token of the step: int64 [T]."""
    return torch.cat([torch.arange(chunk.num_cached, chunk.num_cached + chunk.num_new) for chunk in chunks])


def build_layers(
    num_layers: int, *, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int
) -> tuple[PagedLayer, ...]:
    """Caches full of NaN, so that reading a slot that was never written shows."""
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return tuple(
        PagedLayer(torch.full(shape, float("nan")), torch.full(shape, float("nan"))) for _ in range(num_layers)
    )
