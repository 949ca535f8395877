"""Attention over the paged cache on a CPU against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu_attention, reference, reference_fused
from kernels.kv_codes import CODE_DTYPES
from kernels.paged_batch import PagedLayer, allocate_layer
from kernels.rotary import HeadNorms, Rotation
from tests.paged_cache import Chunk, build_batch, build_layers

WINDOWS = (None, 1, 5, 1000)


def random_heads(num_tokens: int, num_heads: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num_tokens, num_heads, 8, generator=generator)


def test_write_kv_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (PagedLayer(torch.zeros(4, 3, 5, 8), torch.zeros(4, 3, 5, 8)) for _ in range(2))
    keys, values = random_heads(6, 3, generator), random_heads(6, 3, generator)
    batch = build_batch([Chunk([3, 0], 4, 2), Chunk([1, 2], 1, 4)], 5)

    cpu_attention.write_kv(keys, values, ours, cpu_attention.plan_attention(batch, ours, [None]))
    reference.write_kv(keys, values, theirs, batch.slot_mapping)

    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


@pytest.mark.parametrize("rotary_width", [8, 4])
@pytest.mark.parametrize("norms", [None, HeadNorms(torch.full((8,), 0.5), torch.full((8,), 2.0), 1e-5)])
def test_rotate_and_write_is_the_reference(rotary_width: int, norms: HeadNorms | None) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (PagedLayer(torch.zeros(4, 3, 5, 8), torch.zeros(4, 3, 5, 8)) for _ in range(2))
    batch = build_batch([Chunk([3, 0], 4, 2), Chunk([1, 2], 1, 4)], 5)
    heads = random_heads(6, 12, generator)
    rotation = Rotation(torch.randn(6, rotary_width, generator=generator), torch.randn(6, rotary_width))

    queries = cpu_attention.rotate_and_write(
        heads, rotation, norms, ours, cpu_attention.plan_attention(batch, ours, [None])
    )

    expected = reference_fused.rotate_and_write(heads, rotation, norms, theirs, batch.slot_mapping)
    torch.testing.assert_close(queries, expected)
    torch.testing.assert_close(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


def filled_layer(chunks: list[Chunk], num_blocks: int, block_size: int) -> PagedLayer:
    """A cache that holds the whole context of every chunk; unwritten slots hold NaN."""
    generator = torch.Generator().manual_seed(0)
    [layer] = build_layers(1, num_blocks=num_blocks, num_kv_heads=2, block_size=block_size, head_dim=8)
    for chunk in chunks:
        written = build_batch([Chunk(chunk.blocks, 0, chunk.num_cached + chunk.num_new)], block_size).slot_mapping
        for cache in (layer.keys, layer.values):
            cache[written // block_size, :, written % block_size] = random_heads(len(written), 2, generator)
    return layer


def place(lens: list[tuple[int, int]], block_size: int) -> tuple[list[Chunk], int]:
    """Chunks of (num_cached, num_new) tokens in shuffled blocks, and how many blocks there are: one is nobody's."""
    counts = [-(-sum(chunk) // block_size) for chunk in lens]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(1)).tolist()
    chunks = [Chunk([order.pop() for _ in range(count)], *chunk) for count, chunk in zip(counts, lens, strict=True)]
    return chunks, sum(counts) + 1


def attend_both(lens: list[tuple[int, int]], block_size: int, num_heads: int = 6) -> tuple[Tensor, Tensor]:
    """Attention by the kernel and by the reference, with each of WINDOWS."""
    chunks, num_blocks = place(lens, block_size)
    layer, batch = filled_layer(chunks, num_blocks, block_size), build_batch(chunks, block_size)
    query = random_heads(len(batch.slot_mapping), num_heads, torch.Generator().manual_seed(2))
    plan = cpu_attention.plan_attention(batch, layer, WINDOWS)
    ours = [
        cpu_attention.paged_attention(query, layer, plan, softmax_scale=0.3, sliding_window=window)
        for window in WINDOWS
    ]
    theirs = [
        reference.paged_attention(query, layer, batch, softmax_scale=0.3, sliding_window=window) for window in WINDOWS
    ]
    return torch.stack(ours), torch.stack(theirs)


@settings(max_examples=30, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 1, 1, 2, 7, 30])), min_size=1, max_size=6),
    block_size=st.sampled_from([1, 3, 16]),
)
def test_attention_is_the_reference(lens: list[tuple[int, int]], block_size: int) -> None:
    ours, theirs = attend_both(lens, block_size)

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "lens",
    [
        pytest.param([(0, 2 * cpu_attention.QUERY_BLOCK + 3)], id="a prompt of several query blocks"),
        pytest.param([(100, cpu_attention.QUERY_BLOCK + 1), (9, 1)], id="a long chunk after a cached start"),
        pytest.param([(6000, 1), (5000, 1)], id="long contexts"),
    ],
)
def test_attention_over_long_contexts_is_the_reference(lens: list[tuple[int, int]]) -> None:
    ours, theirs = attend_both(lens, block_size=16, num_heads=2)

    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    # given sequences that decode and prompts, of very different lengths
    chunks, num_blocks = place([(700, 1), (3, 1), (0, 19), (130, 1), (60, 300)], block_size=16)
    layer = filled_layer(chunks, num_blocks, block_size=16)
    num_tokens = [chunk.num_new for chunk in chunks]
    queries = random_heads(sum(num_tokens), 6, torch.Generator().manual_seed(2)).split(num_tokens)

    def attend(subset: list[int]) -> list[Tensor]:
        plan = cpu_attention.plan_attention(build_batch([chunks[i] for i in subset], 16), layer, [None])
        query = torch.cat([queries[i] for i in subset])
        output = cpu_attention.paged_attention(query, layer, plan, softmax_scale=0.3)
        return list(output.split([num_tokens[i] for i in subset]))

    # when they are attended together, then each gets what it gets alone, to the bit
    for index, output in enumerate(attend(list(range(len(chunks))))):
        assert torch.equal(output, attend([index])[0])


def test_attention_keeps_the_dtype_of_the_query() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = PagedLayer(*(random_heads(16, 1, generator).view(2, 2, 4, 8).bfloat16() for _ in range(2)))
    batch = build_batch([Chunk([0], 2, 1), Chunk([1], 0, 3)], 4)
    query = random_heads(4, 4, generator).bfloat16()

    plan = cpu_attention.plan_attention(batch, layer, [None])
    ours = cpu_attention.paged_attention(query, layer, plan, softmax_scale=0.3)

    assert ours.dtype == torch.bfloat16
    theirs = reference.paged_attention(query, layer, batch, softmax_scale=0.3)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)


def coded_layer(num_blocks: int, block_size: int, dtype: torch.dtype) -> PagedLayer:
    layer = allocate_layer(num_blocks, 2, block_size, 8, dtype=dtype, device=torch.device("cpu"))
    for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
        assert tensor is not None
        tensor.view(torch.uint8).fill_(255)
    return layer


@pytest.mark.parametrize("cache_dtype", CODE_DTYPES)
def test_a_cache_of_codes_is_written_and_read_as_the_reference_does(cache_dtype: torch.dtype) -> None:
    chunks, num_blocks = place([(0, 20), (9, 1), (3, 4)], 6)
    whole = build_batch([Chunk(chunk.blocks, 0, chunk.num_cached + chunk.num_new) for chunk in chunks], 6)
    ours, theirs = (coded_layer(num_blocks, 6, cache_dtype) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    keys, values = (random_heads(len(whole.slot_mapping), 2, generator) for _ in range(2))
    batch = build_batch(chunks, 6)
    query = random_heads(len(batch.slot_mapping), 6, generator)

    cpu_attention.write_kv(keys, values, ours, cpu_attention.plan_attention(whole, ours, [None]))
    reference.write_kv(keys, values, theirs, whole.slot_mapping)
    plan = cpu_attention.plan_attention(batch, ours, [None])
    attended = cpu_attention.paged_attention(query, ours, plan, softmax_scale=0.3)

    assert torch.equal(ours.keys.view(torch.uint8), theirs.keys.view(torch.uint8))
    assert torch.equal(ours.values.view(torch.uint8), theirs.values.view(torch.uint8))
    expected = reference.paged_attention(query, theirs, batch, softmax_scale=0.3)
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_caps_and_sinks_are_the_references(soft_cap: float | None, has_sinks: bool, window: int | None) -> None:
    chunks, num_blocks = place([(20, 1), (0, 1), (3, 9)], 5)
    layer, batch = filled_layer(chunks, num_blocks, 5), build_batch(chunks, 5)
    query = random_heads(len(batch.slot_mapping), 6, torch.Generator().manual_seed(2))
    sinks = torch.linspace(-2, 2, 6) if has_sinks else None
    plan = cpu_attention.plan_attention(batch, layer, [window])

    ours = cpu_attention.paged_attention(
        query, layer, plan, softmax_scale=2.0, sliding_window=window, soft_cap=soft_cap, sinks=sinks
    )

    theirs = reference.paged_attention(
        query, layer, batch, softmax_scale=2.0, sliding_window=window, soft_cap=soft_cap, sinks=sinks
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
