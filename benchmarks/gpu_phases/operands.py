"""Random operands, made on the device: packed weights, activations, caches and the batches over them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.sizes import HeadShape, LinearShape
from kernels import dispatch
from kernels.launch import IS_INTERPRETED
from kernels.layout import PackedWeight, WeightLayout, repack_planar
from kernels.paged_batch import AttentionBatch, PagedLayer

CODE_BITS = 4
# the standard deviation of a code that is uniform over 0 .. 15: divided by it, weights keep the size of what they read
CODE_SPREAD = 4.6
MIDDLE_CODE = 8


def random_weight(bench: Bench, shape: LinearShape, group_size: int, *, seed: int) -> PackedWeight:
    """A ROW_MAJOR weight of any codes, zero points within one of the middle, and scales that keep outputs near 1."""
    generator = bench.generator(seed)
    num_groups = shape.num_inputs // group_size
    groups = (shape.num_columns, num_groups)
    codes = torch.randint(
        0, 256, (shape.num_columns, shape.num_inputs // 2), generator=generator, dtype=torch.uint8, device=bench.device
    )
    spread = 0.5 + torch.rand(groups, generator=generator, device=bench.device)
    zeros = torch.randint(
        MIDDLE_CODE - 1, MIDDLE_CODE + 2, groups, generator=generator, dtype=torch.uint8, device=bench.device
    )
    return PackedWeight(
        codes=codes,
        scales=(spread / (CODE_SPREAD * shape.num_inputs**0.5)).to(torch.float16),
        zeros=zeros,
        shape=(shape.num_columns, shape.num_inputs),
        bits=CODE_BITS,
        group_size=group_size,
        layout=WeightLayout.ROW_MAJOR,
    )


def prepare_for_kernels(weight: PackedWeight, bench: Bench) -> PackedWeight:
    """The ROW_MAJOR weight as the Triton kernels read it, on the device; interpreted ones read the CPU's memory."""
    return repack_planar(weight) if IS_INTERPRETED else dispatch.prepare_weight(weight, bench.device)


def copies_of(weight: PackedWeight, num_copies: int) -> list[PackedWeight]:
    """The weight so many times, each in memory of its own; the first is the weight itself."""
    others = [replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone()) for _ in range(num_copies - 1)]
    return [weight, *others]


def bytes_of(weight: PackedWeight) -> int:
    """What a kernel has to read of it: zero points lie among the scales."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (weight.codes, weight.scales))


def random_rows(bench: Bench, shape: Sequence[int], dtype: torch.dtype, *, seed: int) -> Tensor:
    """Normally distributed values of any shape."""
    return torch.randn(tuple(shape), generator=bench.generator(seed), device=bench.device).to(dtype)


@dataclass(frozen=True)
class Sequences:
    """num_cached tokens of each sequence are in the cache before the step, num_new are the step's."""

    num_cached: tuple[int, ...]
    num_new: tuple[int, ...]
    block_size: int

    @property
    def context_lens(self) -> tuple[int, ...]:
        return tuple(cached + new for cached, new in zip(self.num_cached, self.num_new, strict=True))

    @property
    def blocks_each(self) -> int:
        """Of the longest; every sequence owns as many."""
        return -(-max(self.context_lens) // self.block_size)

    @property
    def num_blocks(self) -> int:
        return self.blocks_each * len(self.num_new)


def batch_of(sequences: Sequences, device: torch.device) -> AttentionBatch:
    """The step's batch; the blocks of a sequence are scattered over the cache, as in a server that has run a while."""
    num_sequences, size = len(sequences.num_new), sequences.block_size
    order = torch.randperm(sequences.num_blocks, generator=torch.Generator().manual_seed(0))
    tables = order.view(num_sequences, sequences.blocks_each)
    starts = torch.tensor([0, *sequences.num_new]).cumsum(0)
    slots = []
    for table, cached, new in zip(tables, sequences.num_cached, sequences.num_new, strict=True):
        positions = torch.arange(cached, cached + new)
        slots.append(table[positions // size] * size + positions % size)
    return AttentionBatch(
        query_starts=starts.to(torch.int32).to(device),
        context_lens=torch.tensor(sequences.context_lens, dtype=torch.int32).to(device),
        block_tables=tables.to(torch.int32).to(device),
        slot_mapping=torch.cat(slots).to(device),
        max_query_len=max(sequences.num_new),
        max_context_len=max(sequences.context_lens),
    )


def random_cache(
    bench: Bench, heads: HeadShape, num_blocks: int, block_size: int, dtype: torch.dtype, *, seed: int
) -> PagedLayer:
    """A cache full of values, so that whatever is read is finite."""
    shape = (num_blocks, heads.num_kv_heads, block_size, heads.width)
    return PagedLayer(random_rows(bench, shape, dtype, seed=seed), random_rows(bench, shape, dtype, seed=seed + 1))
