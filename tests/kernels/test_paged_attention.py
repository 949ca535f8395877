"""Attention over the paged cache against the reference: decode, prefill and both in one batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.paged_attention import paged_attention
from tests.kernels.attention_scenes import (
    CODE_DTYPES,
    DEMO,
    SMALL,
    Heads,
    Scores,
    assert_is_the_reference,
    build_scene,
)
from tests.kernels.launches import HALF_TYPES

# what a cache may hold beside the model's own dtype
CACHES = [None, *CODE_DTYPES]


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("window", [None, 5, 100])
def test_a_mixed_batch_of_the_demo_models_heads(dtype: torch.dtype, window: int | None) -> None:
    scene = build_scene([(0, 1), (64, 1), (37, 3), (30, 50), (0, 20)], DEMO, dtype)

    assert_is_the_reference(scene, Scores(sliding_window=window))


@settings(max_examples=8, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 90), st.sampled_from([1, 1, 2, 7, 40])), min_size=1, max_size=3),
    heads=st.builds(
        lambda group, num_kv_heads, width, block_size: Heads(group * num_kv_heads, num_kv_heads, width, block_size),
        group=st.sampled_from([1, 3, 8, 9]),
        num_kv_heads=st.sampled_from([1, 2]),
        width=st.sampled_from([8, 64, 80, 96]),
        block_size=st.sampled_from([4, 16, 64, 128]),
    ),
    dtype=st.sampled_from(HALF_TYPES),
    cache_dtype=st.sampled_from(CACHES),
    window=st.sampled_from([None, 1, 17]),
    soft_cap=st.sampled_from([None, 2.0]),
    has_sinks=st.booleans(),
)
def test_any_batch_is_the_reference(
    sequences: list[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    window: int | None,
    soft_cap: float | None,
    has_sinks: bool,
) -> None:
    sinks = torch.linspace(-3, 3, heads.num_query_heads) if has_sinks else None
    scene = build_scene(sequences, heads, dtype, cache_dtype=cache_dtype)

    assert_is_the_reference(scene, Scores(sliding_window=window, soft_cap=soft_cap, sinks=sinks))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_every_width_of_heads(width: int, cache_dtype: torch.dtype | None) -> None:
    heads = Heads(num_query_heads=2, num_kv_heads=1, width=width, block_size=64)

    assert_is_the_reference(build_scene([(70, 1), (20, 9)], heads, torch.float16, cache_dtype=cache_dtype))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("context_len", [512, 513, 1100])
@pytest.mark.parametrize("window", [None, 520])
def test_decoding_over_span_borders(context_len: int, window: int | None, cache_dtype: torch.dtype | None) -> None:
    scene = build_scene([(context_len - 1, 1)], SMALL, torch.float16, cache_dtype=cache_dtype)

    assert_is_the_reference(scene, Scores(sliding_window=window))


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("softmax_scale", [0.01, 3.0])
def test_any_scale(softmax_scale: float, cache_dtype: torch.dtype | None) -> None:
    scene = build_scene([(70, 1), (3, 20)], SMALL, torch.float16, cache_dtype=cache_dtype)

    assert_is_the_reference(scene, Scores(softmax_scale=softmax_scale))


def test_a_soft_cap_bends_large_scores_and_neither_overflows_nor_changes_their_sign() -> None:
    scene = build_scene([(70, 1), (3, 20)], SMALL, torch.float16)
    scene.query.mul_(1000)

    assert_is_the_reference(scene, Scores(softmax_scale=1.0, soft_cap=3.0))


@pytest.mark.parametrize("sink", [-float("inf"), -2.0, 40.0])
def test_a_sink_takes_its_share_of_the_weights(sink: float) -> None:
    scene = build_scene([(600, 1), (3, 20)], SMALL, torch.float16)

    assert_is_the_reference(scene, Scores(sinks=torch.tensor([sink, 0.0, sink, 1.0])))


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
