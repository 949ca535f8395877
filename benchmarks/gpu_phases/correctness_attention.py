"""The checks of attention over the paged cache and of the write into it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench, Item
from benchmarks.gpu_phases.figures import Cell, Figure
from benchmarks.gpu_phases.operands import Sequences, batch_of, random_cache, random_rows
from benchmarks.gpu_phases.sizes import HALF_TYPES, HalfName, HeadShape
from benchmarks.gpu_phases.verdicts import same_bits, verdict
from kernels import reference
from kernels.paged_attention import paged_attention
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.write_kv import write_kv

TABLE = "Attention against float32"
# weights are rounded to the cache's dtype before they multiply the values, and the result once more
ROUNDING = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def attention_items(bench: Bench) -> Sequence[Item]:
    return [
        Item(f"attention {dtype} {heads.num_heads}/{heads.num_kv_heads}x{heads.width} blocks of {block_size}", work)
        for heads in bench.sizes.checked_heads
        for dtype in HALF_TYPES
        for block_size in bench.sizes.block_sizes
        for work in [partial(_check, bench, dtype, heads, block_size)]
    ]


def _check(bench: Bench, dtype: HalfName, heads: HeadShape, block_size: int) -> Iterator[Figure]:
    context = bench.sizes.checked_context
    # decoding at all lengths, a prompt, a chunk of one, and two chunks of which one starts within a block
    sequences = Sequences(
        num_cached=(context - 1, context // 3, 0, 0, context // 2 - 3, 5),
        num_new=(1, 1, 1, context // 4 + 1, 7, 2),
        block_size=block_size,
    )
    scene = _Scene(bench, heads, sequences, HALF_TYPES[dtype])
    label = f"{dtype} {heads.num_heads}/{heads.num_kv_heads} heads of {heads.width}, blocks of {block_size}"
    yield _check_write(bench, scene, label)
    for window in (None, context // 5):
        out, again = scene.attend(window), scene.attend(window)
        expected = reference.paged_attention(
            scene.query, scene.layer, scene.batch, softmax_scale=scene.softmax_scale, sliding_window=window
        )
        error = float((out.float() - expected.float()).abs().max())
        values: dict[str, Cell] = {
            "error / allowed": error / ROUNDING[out.dtype],
            "twice the same bits": same_bits(out, again),
            "alone the same bits": scene.is_the_same_alone(out, window),
        }
        passed = error <= ROUNDING[out.dtype] and all(value for value in values.values() if isinstance(value, bool))
        name = f"{label}{'' if window is None else f', window {window}'}"
        yield verdict(TABLE, name, values, passed=passed)


class _Scene:
    """A step of several sequences over a random cache."""

    def __init__(self, bench: Bench, heads: HeadShape, sequences: Sequences, dtype: torch.dtype) -> None:
        self.batch = batch_of(sequences, bench.device)
        self.layer = random_cache(bench, heads, sequences.num_blocks, sequences.block_size, dtype, seed=11)
        num_tokens = sum(sequences.num_new)
        self.query = random_rows(bench, (num_tokens, heads.num_heads, heads.width), dtype, seed=13)
        self.new_keys, self.new_values = (
            random_rows(bench, (num_tokens, heads.num_kv_heads, heads.width), dtype, seed=seed) for seed in (14, 15)
        )
        self.num_new = sequences.num_new
        self.context_lens = sequences.context_lens
        self.softmax_scale = heads.width**-0.5

    def attend(self, window: int | None) -> Tensor:
        return paged_attention(
            self.query, self.layer, self.batch, softmax_scale=self.softmax_scale, sliding_window=window
        )

    def is_the_same_alone(self, together: Tensor, window: int | None) -> bool:
        """Whether each sequence gets the bits that it gets in a batch of its own."""
        first = 0
        for index, num_new in enumerate(self.num_new):
            tokens = slice(first, first + num_new)
            alone = paged_attention(
                self.query[tokens],
                self.layer,
                self._batch_alone(index, first),
                softmax_scale=self.softmax_scale,
                sliding_window=window,
            )
            if not same_bits(alone, together[tokens]):
                return False
            first += num_new
        return True

    def _batch_alone(self, index: int, first: int) -> AttentionBatch:
        num_new = self.num_new[index]
        return replace(
            self.batch,
            query_starts=torch.tensor([0, num_new], dtype=torch.int32, device=self.query.device),
            context_lens=self.batch.context_lens[index : index + 1],
            block_tables=self.batch.block_tables[index : index + 1],
            slot_mapping=self.batch.slot_mapping[first : first + num_new],
            max_query_len=num_new,
            max_context_len=self.context_lens[index],
        )


def _check_write(bench: Bench, scene: _Scene, label: str) -> Figure:
    """The cache after our write beside the cache after the reference's, bit for bit; the scene's is ours then."""
    layer = scene.layer
    expected = PagedLayer(layer.keys.clone(), layer.values.clone())
    reference.write_kv(scene.new_keys, scene.new_values, expected, scene.batch.slot_mapping)
    write_kv(scene.new_keys, scene.new_values, layer, scene.batch.slot_mapping)
    bench.stopwatch.wait()
    passed = same_bits(layer.keys, expected.keys) and same_bits(layer.values, expected.values)
    return verdict(TABLE, f"write, {label}", {}, passed=passed)
