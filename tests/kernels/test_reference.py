"""The reference operations against definitions worked out by hand or by plain loops."""

import math
from collections.abc import Callable

import torch

from kernels import reference
from kernels.layout import GroupCodes, pack
from kernels.paged_batch import PagedLayer
from tests.kernels.packed_weights import random_packed_weight
from tests.paged_cache import Chunk, build_batch


def test_dequantize_subtracts_the_zero_point_and_scales_group_by_group() -> None:
    weight = pack(
        GroupCodes(
            codes=torch.tensor([[0, 15, 7, 8]], dtype=torch.uint8),
            scales=torch.tensor([[0.5, 2.0]]),
            zeros=torch.tensor([[8, 7]], dtype=torch.uint8),
            bits=4,
            group_size=2,
        )
    )

    assert reference.dequantize(weight).tolist() == [[-4.0, 3.5, 0.0, 2.0]]


def test_quantized_linear_is_a_product_with_the_dequantized_weight() -> None:
    weight = random_packed_weight(5, 64, 32)
    dense = reference.dequantize(weight)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    bias = torch.arange(5.0)

    output = reference.quantized_linear(x, weight, bias)

    for row in range(3):
        for column in range(5):
            expected = math.fsum((x[row].double() * dense[column].double()).tolist()) + column
            assert abs(float(output[row, column]) - expected) < 1e-5


def test_quantized_linear_answers_in_the_dtype_of_x() -> None:
    x = torch.ones(1, 64, dtype=torch.bfloat16)

    assert reference.quantized_linear(x, random_packed_weight(4, 64, 32)).dtype == torch.bfloat16


def _layer(block_size: int) -> PagedLayer:
    generator = torch.Generator().manual_seed(1)
    shape = (6, 2, block_size, 4)
    return PagedLayer(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def _vector(cache: torch.Tensor, blocks: list[int], position: int, head: int) -> torch.Tensor:
    block_size = cache.shape[2]
    return cache[blocks[position // block_size], head, position % block_size]


def _attend_by_loops(
    query: torch.Tensor,
    layer: PagedLayer,
    blocks: list[int],
    position: int,
    first_visible: int,
    *,
    bend: Callable[[float], float] = lambda score: score,
    sink_weight: float = 0.0,
) -> torch.Tensor:
    """One token's attention, head by head and key by key; two query heads share a key head."""
    rows = []
    for head in range(4):
        keys = [_vector(layer.keys, blocks, p, head // 2) for p in range(first_visible, position + 1)]
        values = [_vector(layer.values, blocks, p, head // 2) for p in range(first_visible, position + 1)]
        weights = [math.exp(bend(0.5 * float(query[head] @ key))) for key in keys]
        whole = sum(weights) + sink_weight
        rows.append(sum((w / whole * v for w, v in zip(weights, values, strict=True)), torch.zeros(4)))
    return torch.stack(rows)


def test_paged_attention_sees_the_past_of_its_own_sequence() -> None:
    layer, tables = _layer(block_size=3), ([4, 1, 2], [0, 5])
    chunks = [Chunk(tables[0], 5, 2), Chunk(tables[1], 3, 1)]
    query = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2))

    output = reference.paged_attention(query, layer, build_batch(chunks, 3), softmax_scale=0.5)

    expected = [
        _attend_by_loops(query[0], layer, tables[0], 5, 0),
        _attend_by_loops(query[1], layer, tables[0], 6, 0),
        _attend_by_loops(query[2], layer, tables[1], 3, 0),
    ]
    torch.testing.assert_close(output, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_sliding_window_counts_the_token_itself() -> None:
    layer, blocks = _layer(block_size=3), [4, 1, 2]
    query = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(3))
    batch = build_batch([Chunk(blocks, 6, 1)], 3)

    output = reference.paged_attention(query, layer, batch, softmax_scale=0.5, sliding_window=2)

    expected = _attend_by_loops(query[0], layer, blocks, 6, 5)
    torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=0)


def test_a_soft_cap_bends_the_scaled_score() -> None:
    layer, blocks = _layer(block_size=3), [4, 1, 2]
    query = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(3)) * 5
    batch = build_batch([Chunk(blocks, 6, 1)], 3)

    output = reference.paged_attention(query, layer, batch, softmax_scale=0.5, soft_cap=2.0)

    expected = _attend_by_loops(query[0], layer, blocks, 6, 0, bend=lambda score: 2.0 * math.tanh(score / 2.0))
    torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=0)


def test_a_sink_takes_weight_and_gives_no_value() -> None:
    layer, blocks = _layer(block_size=3), [4, 1, 2]
    query = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(3))
    batch = build_batch([Chunk(blocks, 6, 1)], 3)

    output = reference.paged_attention(query, layer, batch, softmax_scale=0.5, sinks=torch.full((4,), 0.7))

    expected = _attend_by_loops(query[0], layer, blocks, 6, 0, sink_weight=math.exp(0.7))
    torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=0)


def test_write_kv_touches_only_its_slots() -> None:
    layer = PagedLayer(torch.zeros(2, 1, 3, 2), torch.zeros(2, 1, 3, 2))

    reference.write_kv(torch.ones(2, 1, 2), torch.full((2, 1, 2), 2.0), layer, torch.tensor([1, 5]))

    assert layer.keys[:, 0, :, 0].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert layer.values[:, 0, :, 1].tolist() == [[0, 2, 0], [0, 0, 2]]
