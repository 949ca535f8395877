"""Native rotation and attention over the paged cache against the reference, and their independence of batch mates."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.native_cpu import AttentionInputs, NativeCpu, allocate_native_layer
from kernels.native_program import HeadShape, Norm, ProgramBuilder
from kernels.paged_batch import PagedLayer
from tests.kernels.native_libraries import open_native, running_instruction_sets
from tests.paged_cache import Chunk, build_batch, build_layers, build_positions

NAMES = [candidate.name for candidate in running_instruction_sets()] or ["none"]
BLOCK_SIZE = 16
# keys and values are kept in float16
TOLERANCE = 3e-3


@dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def shape(self, norm: Norm | None = None) -> HeadShape:
        return HeadShape(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim**-0.5, self.window, norm, norm)

    def allocate(self, num_blocks: int) -> PagedLayer:
        layer = allocate_native_layer(num_blocks, self.num_kv_heads, BLOCK_SIZE, self.head_dim)
        # what was never written must never count
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
        return layer


def place(lens: list[tuple[int, int]]) -> tuple[list[Chunk], int]:
    """Chunks of (num_cached, num_new) tokens in shuffled blocks, and how many blocks there are."""
    counts = [-(-sum(chunk) // BLOCK_SIZE) for chunk in lens]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist()
    return [Chunk([order.pop() for _ in range(count)], *chunk) for count, chunk in zip(counts, lens, strict=True)], sum(
        counts
    )


def attend(
    native: NativeCpu, heads: Heads, chunks: list[Chunk], qkv: Tensor, layer: PagedLayer, norm: Norm | None = None
) -> Tensor:
    """[T, H * D] of qkv [T, width], rotated by angles that grow with the position."""
    builder = ProgramBuilder()
    source, target = builder.floats(heads.width), builder.floats(heads.num_heads * heads.head_dim)
    builder.attend(source, target, heads.shape(norm), 0)
    output = torch.empty(len(qkv), heads.num_heads * heads.head_dim)
    cosines, sines = angles(chunks, heads)
    inputs = AttentionInputs(build_batch(chunks, BLOCK_SIZE), [layer], cosines, sines)
    native.run(builder.finish(), len(qkv), {source: qkv.clone(), target: output}, inputs)
    return output


def angles(chunks: list[Chunk], heads: Heads) -> tuple[Tensor, Tensor]:
    radians = build_positions(chunks)[:, None] * torch.linspace(0.001, 1, heads.head_dim // 2)
    return radians.cos(), radians.sin()


def expected_attention(
    heads: Heads, chunks: list[Chunk], qkv: Tensor, num_blocks: int, norm: Norm | None = None
) -> Tensor:
    """The same by the reference, for chunks that start their sequences."""
    parts = qkv.view(len(qkv), -1, heads.head_dim)
    queries, keys, values = parts.split((heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), dim=1)
    if norm is not None:
        queries, keys = (
            torch.nn.functional.rms_norm(part, (heads.head_dim,), norm.weight, norm.epsilon) for part in (queries, keys)
        )
    cosines, sines = (values.repeat(1, 2)[:, None] for values in angles(chunks, heads))
    half = heads.head_dim // 2
    queries, keys = (
        part * cosines + torch.cat((-part[..., half:], part[..., :half]), dim=-1) * sines for part in (queries, keys)
    )
    [layer] = build_layers(
        1,
        num_blocks=num_blocks,
        num_kv_heads=heads.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=heads.head_dim,
    )
    batch = build_batch(chunks, BLOCK_SIZE)
    reference.write_kv(keys, values, layer, batch.slot_mapping)
    attended = reference.paged_attention(
        queries, layer, batch, softmax_scale=heads.head_dim**-0.5, sliding_window=heads.window
    )
    return attended.flatten(1)


def random_qkv(num_tokens: int, heads: Heads) -> Tensor:
    return torch.randn(num_tokens, heads.width, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(
    lens=st.lists(st.sampled_from([1, 2, 3, 4, 5, 17, 40]), min_size=1, max_size=4),
    group=st.sampled_from([1, 2, 3, 4, 7, 13]),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 64, 80, 128]),
    window=st.sampled_from([None, 1, 5, 16, 1000]),
    name=st.sampled_from(NAMES),
)
def test_attention_is_the_reference(
    lens: list[int], group: int, num_kv_heads: int, head_dim: int, window: int | None, name: str
) -> None:
    heads = Heads(group * num_kv_heads, num_kv_heads, head_dim, window)
    chunks, num_blocks = place([(0, count) for count in lens])
    qkv = random_qkv(sum(lens), heads)

    output = attend(open_native(name), heads, chunks, qkv, heads.allocate(num_blocks))

    torch.testing.assert_close(output, expected_attention(heads, chunks, qkv, num_blocks), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_queries_and_keys_are_normalized_per_head(name: str) -> None:
    heads = Heads(4, 2, 32)
    chunks, num_blocks = place([(0, 20)])
    qkv, norm = random_qkv(20, heads), Norm(torch.linspace(0.5, 1.5, 32), 1e-6)

    output = attend(open_native(name), heads, chunks, qkv, heads.allocate(num_blocks), norm)

    expected = expected_attention(heads, chunks, qkv, num_blocks, norm)
    torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window", [None, 20])
def test_a_prompt_in_any_chunks_beside_any_others_gives_the_same_bits(name: str, window: int | None) -> None:
    native, heads = open_native(name), Heads(6, 2, 64, window)
    blocks, other = list(range(5)), Chunk(range(5, 12), 0, 101)
    qkv, other_qkv = random_qkv(70, heads), 3 * random_qkv(101, heads)
    whole = attend(native, heads, [Chunk(blocks, 0, 70)], qkv, heads.allocate(12))

    for cuts in ([1, 69], [3, 4, 63], [16, 16, 38], [1] * 70):
        layer, start, parts = heads.allocate(12), 0, []
        for count in cuts:
            rows = torch.cat((other_qkv, qkv[start : start + count]))
            output = attend(native, heads, [other, Chunk(blocks, start, count)], rows, layer)
            parts.append(output[len(other_qkv) :])
            start += count
        assert torch.equal(torch.cat(parts), whole)


def test_a_cache_has_the_shape_of_all_and_multiples_of_16() -> None:
    layer = allocate_native_layer(3, 2, 32, 64)

    assert layer.keys.shape == layer.values.shape == (3, 2, 32, 64)
    with pytest.raises(ValueError, match="multiples of 16, not 20 tokens and 64 elements"):
        allocate_native_layer(3, 2, 20, 64)
    with pytest.raises(ValueError, match="multiples of 16, not 16 tokens and 72 elements"):
        allocate_native_layer(3, 2, 16, 72)
