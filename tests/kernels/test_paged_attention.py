"""Attention over the paged cache against the reference: decode, prefill and both in one batch."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.paged_attention import paged_attention, write_kv
from kernels.paged_batch import AttentionBatch, PagedLayer
from tests.kernels.launches import DEVICE, HALF_TYPES, fresh_memory_is_nan
from tests.paged_cache import Chunk, build_batch

# weights are rounded to the cache's dtype before they multiply the values, and the result once more
ROUNDING = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class Heads:
    num_query_heads: int
    num_kv_heads: int
    width: int
    block_size: int


@dataclass(frozen=True)
class Scene:
    """A step whose cache is filled with what the sequences said so far, and with NaN elsewhere."""

    query: Tensor
    layer: PagedLayer
    batch: AttentionBatch


DEMO = Heads(num_query_heads=9, num_kv_heads=3, width=64, block_size=16)
SMALL = Heads(num_query_heads=4, num_kv_heads=2, width=32, block_size=64)


def build_scene(
    sequences: list[tuple[int, int]], heads: Heads, dtype: torch.dtype, *, seeds: list[int] | None = None
) -> Scene:
    """sequences: (tokens in the cache, new tokens) of each; a sequence's tensors are a function of its seed."""
    chunks, num_blocks = [], 1
    for num_cached, num_new in sequences:
        last = num_blocks + -(-(num_cached + num_new) // heads.block_size)
        # not in order in memory, and block 0 is nobody's
        chunks.append(Chunk(blocks=list(range(num_blocks, last))[::-1], num_cached=num_cached, num_new=num_new))
        num_blocks = last
    shape = (num_blocks, heads.num_kv_heads, heads.block_size, heads.width)
    layer = PagedLayer(torch.full(shape, float("nan"), dtype=dtype), torch.full(shape, float("nan"), dtype=dtype))
    queries = []
    for index, chunk in enumerate(chunks):
        generator = torch.Generator().manual_seed(index if seeds is None else seeds[index])
        length = chunk.num_cached + chunk.num_new
        kv_shape = (length, heads.num_kv_heads, heads.width)
        everything = dataclasses.replace(chunk, num_cached=0, num_new=length)
        keys, values = (torch.randn(kv_shape, generator=generator).to(dtype) for _ in range(2))
        reference.write_kv(keys, values, layer, build_batch([everything], heads.block_size).slot_mapping)
        query = torch.randn((length, heads.num_query_heads, heads.width), generator=generator).to(dtype)
        queries.append(query[chunk.num_cached :])
    return Scene(torch.cat(queries), layer, build_batch(chunks, heads.block_size))


def attend(scene: Scene, *, sliding_window: int | None = None) -> Tensor:
    layer = PagedLayer(scene.layer.keys.to(DEVICE), scene.layer.values.to(DEVICE))
    batch = dataclasses.replace(
        scene.batch,
        query_starts=scene.batch.query_starts.to(DEVICE),
        context_lens=scene.batch.context_lens.to(DEVICE),
        block_tables=scene.batch.block_tables.to(DEVICE),
    )
    with fresh_memory_is_nan():
        out = paged_attention(scene.query.to(DEVICE), layer, batch, softmax_scale=0.125, sliding_window=sliding_window)
    return out.cpu()


def assert_is_the_reference(scene: Scene, *, sliding_window: int | None = None) -> None:
    out = attend(scene, sliding_window=sliding_window)
    expected = reference.paged_attention(
        scene.query, scene.layer, scene.batch, softmax_scale=0.125, sliding_window=sliding_window
    )
    rounding = ROUNDING[scene.query.dtype]
    assert out.dtype == scene.query.dtype
    torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("window", [None, 5, 100])
def test_a_mixed_batch_of_the_demo_models_heads(dtype: torch.dtype, window: int | None) -> None:
    scene = build_scene([(0, 1), (64, 1), (37, 3), (30, 50), (0, 20)], DEMO, dtype)

    assert_is_the_reference(scene, sliding_window=window)


@settings(max_examples=6, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=3),
    heads=st.builds(
        lambda group, num_kv_heads, width, block_size: Heads(group * num_kv_heads, num_kv_heads, width, block_size),
        group=st.sampled_from([1, 3, 8]),
        num_kv_heads=st.sampled_from([1, 2]),
        width=st.sampled_from([8, 64, 80]),
        block_size=st.sampled_from([4, 16, 64]),
    ),
    dtype=st.sampled_from(HALF_TYPES),
    window=st.sampled_from([None, 1, 17]),
)
def test_any_batch_is_the_reference(
    sequences: list[tuple[int, int]], heads: Heads, dtype: torch.dtype, window: int | None
) -> None:
    assert_is_the_reference(build_scene(sequences, heads, dtype), sliding_window=window)


@pytest.mark.parametrize("context_len", [512, 513, 1100])
@pytest.mark.parametrize("window", [None, 520])
def test_decoding_over_span_borders(context_len: int, window: int | None) -> None:
    assert_is_the_reference(build_scene([(context_len - 1, 1)], SMALL, torch.float16), sliding_window=window)


def test_a_decoded_sequence_has_the_same_bits_whatever_runs_beside_it() -> None:
    alone = attend(build_scene([(600, 1)], SMALL, torch.float16, seeds=[5]))

    beside_decodes = attend(build_scene([(3, 1), (600, 1), (20, 1)], SMALL, torch.float16, seeds=[1, 5, 2]))
    beside_prefill = attend(build_scene([(600, 1), (10, 30)], SMALL, torch.float16, seeds=[5, 1]))

    assert torch.equal(beside_decodes[1], alone[0])
    assert torch.equal(beside_prefill[0], alone[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_sequence(value: float) -> None:
    scene = build_scene([(20, 1), (7, 1), (5, 3)], SMALL, torch.float16)
    clean = attend(scene)
    scene.layer.keys[scene.batch.block_tables[1, 0], :, 2] = value
    scene.query[1] = value

    out = attend(scene)

    assert not torch.isfinite(out[1]).any()
    assert torch.equal(out[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_write_kv_fills_its_slots_and_nothing_else(dtype: torch.dtype) -> None:
    shape = (4, 3, 16, 20)
    layer = PagedLayer(torch.full(shape, -1.0, dtype=dtype), torch.full(shape, -2.0, dtype=dtype))
    expected = PagedLayer(layer.keys.clone(), layer.values.clone())
    # keys and values are slices of one projection's output, as in the decoder
    fused = torch.randn(5, 6, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    slots = torch.tensor([63, 0, 17, 31, 40])
    on_device = PagedLayer(layer.keys.to(DEVICE), layer.values.to(DEVICE))

    write_kv(fused.to(DEVICE)[:, :3], fused.to(DEVICE)[:, 3:], on_device, slots.to(DEVICE))

    reference.write_kv(fused[:, :3], fused[:, 3:], expected, slots)
    assert torch.equal(on_device.keys.cpu(), expected.keys)
    assert torch.equal(on_device.values.cpu(), expected.values)


def test_operands_that_do_not_fit_are_refused() -> None:
    scene = build_scene([(3, 1), (4, 2)], SMALL, torch.float16)

    def attend_with(
        *, query: Tensor = scene.query, scale: float = 1.0, window: int | None = None, **batch: Tensor
    ) -> None:
        changed = dataclasses.replace(scene.batch, **batch)
        paged_attention(query, scene.layer, changed, softmax_scale=scale, sliding_window=window)

    with pytest.raises(ValueError, match="float16 or bfloat16"):
        attend_with(query=scene.query.float())
    with pytest.raises(ValueError, match=r"cache must be in the model's torch\.bfloat16"):
        attend_with(query=scene.query.bfloat16())
    with pytest.raises(ValueError, match=r"query must be \[T, H, 32\] with H a multiple of the cache's 2 heads"):
        attend_with(query=scene.query[:, :3])
    with pytest.raises(ValueError, match="softmax_scale must be positive"):
        attend_with(scale=0.0)
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        attend_with(window=0)
    with pytest.raises(ValueError, match="context_lens must be int32"):
        attend_with(context_lens=scene.batch.context_lens.long())
    with pytest.raises(ValueError, match=r"query_starts must be int32 \[3\]"):
        attend_with(query_starts=scene.batch.query_starts[:2])
    with pytest.raises(ValueError, match="block_tables must be int32"):
        attend_with(block_tables=scene.batch.block_tables.long())


def test_a_write_that_does_not_fit_is_refused() -> None:
    layer = build_scene([(3, 1)], SMALL, torch.float16).layer
    new, slots = torch.zeros(2, 2, 32, dtype=torch.float16), torch.tensor([64, 65])

    with pytest.raises(ValueError, match=r"keys must be torch\.float16"):
        write_kv(new[:, :1], new, layer, slots)
    with pytest.raises(ValueError, match=r"values must be torch\.float16"):
        write_kv(new, new.bfloat16(), layer, slots)
    with pytest.raises(ValueError, match="one int64 slot"):
        write_kv(new, new, layer, slots.int())
