"""Steps of attention for the tests: caches that hold what sequences said so far, and NaN everywhere else."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import reference
from kernels.paged_attention import paged_attention
from kernels.paged_batch import AttentionBatch, PagedLayer, allocate_layer
from tests.kernels.launches import DEVICE, fresh_memory_is_nan
from tests.paged_cache import Chunk, build_batch

# what a sequence could say: its tensors are a function of its seed alone
MAX_LENGTH = 1104
# weights are rounded to fp16 or the cache's dtype before they multiply the values, and the result once more
ROUNDING = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
CODE_DTYPES = [torch.uint8, torch.float8_e4m3fn]


@dataclass(frozen=True)
class Heads:
    num_query_heads: int
    num_kv_heads: int
    width: int
    block_size: int


@dataclass(frozen=True)
class Scores:
    """The settings of attention, as all its implementations take them."""

    softmax_scale: float = 0.125
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class Scene:
    """A step over a cache in which nothing but the sequences' own tokens is finite."""

    query: Tensor
    layer: PagedLayer
    batch: AttentionBatch


DEMO = Heads(num_query_heads=9, num_kv_heads=3, width=64, block_size=16)
SMALL = Heads(num_query_heads=4, num_kv_heads=2, width=32, block_size=64)


def broken_layer(num_blocks: int, heads: Heads, dtype: torch.dtype) -> PagedLayer:
    """A cache of NaN: codes with all bits set are NaN in e4m3, and their scales are NaN."""
    layer = allocate_layer(
        num_blocks, heads.num_kv_heads, heads.block_size, heads.width, dtype=dtype, device=torch.device("cpu")
    )
    for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
        if tensor is not None:
            tensor.view(torch.uint8).fill_(255)
    return layer


def build_scene(
    sequences: list[tuple[int, int]],
    heads: Heads,
    dtype: torch.dtype,
    *,
    cache_dtype: torch.dtype | None = None,
    seeds: list[int] | None = None,
) -> Scene:
    """sequences: (tokens in the cache, new tokens) of each; a sequence's tensors are a function of its seed."""
    chunks, num_blocks = [], 1
    for num_cached, num_new in sequences:
        last = num_blocks + -(-(num_cached + num_new) // heads.block_size)
        # not in order in memory, and block 0 is nobody's
        chunks.append(Chunk(blocks=list(range(num_blocks, last))[::-1], num_cached=num_cached, num_new=num_new))
        num_blocks = last
    layer = broken_layer(num_blocks, heads, cache_dtype or dtype)
    queries = []
    for index, chunk in enumerate(chunks):
        generator = torch.Generator().manual_seed(index if seeds is None else seeds[index])
        kv_shape = (MAX_LENGTH, heads.num_kv_heads, heads.width)
        length = chunk.num_cached + chunk.num_new
        keys, values = (torch.randn(kv_shape, generator=generator)[:length].to(dtype) for _ in range(2))
        everything = dataclasses.replace(chunk, num_cached=0, num_new=length)
        reference.write_kv(keys, values, layer, build_batch([everything], heads.block_size).slot_mapping)
        query = torch.randn((MAX_LENGTH, heads.num_query_heads, heads.width), generator=generator).to(dtype)
        queries.append(query[chunk.num_cached : length])
    return Scene(torch.cat(queries), layer, build_batch(chunks, heads.block_size))


def on_device(layer: PagedLayer) -> PagedLayer:
    return PagedLayer(
        layer.keys.to(DEVICE),
        layer.values.to(DEVICE),
        None if layer.key_scales is None else layer.key_scales.to(DEVICE),
        None if layer.value_scales is None else layer.value_scales.to(DEVICE),
    )


def attend(scene: Scene, scores: Scores = Scores()) -> Tensor:
    """What the Triton kernels make of the scene."""
    batch = dataclasses.replace(
        scene.batch,
        query_starts=scene.batch.query_starts.to(DEVICE),
        context_lens=scene.batch.context_lens.to(DEVICE),
        block_tables=scene.batch.block_tables.to(DEVICE),
    )
    with fresh_memory_is_nan():
        out = paged_attention(
            scene.query.to(DEVICE),
            on_device(scene.layer),
            batch,
            softmax_scale=scores.softmax_scale,
            sliding_window=scores.sliding_window,
            soft_cap=scores.soft_cap,
            sinks=None if scores.sinks is None else scores.sinks.to(DEVICE),
        )
    return out.cpu()


def assert_is_the_reference(scene: Scene, scores: Scores = Scores()) -> None:
    out = attend(scene, scores)
    expected = reference.paged_attention(
        scene.query,
        scene.layer,
        scene.batch,
        softmax_scale=scores.softmax_scale,
        sliding_window=scores.sliding_window,
        soft_cap=scores.soft_cap,
        sinks=scores.sinks,
    )
    rounding = ROUNDING[scene.query.dtype]
    assert out.dtype == scene.query.dtype
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(out, expected, rtol=rounding, atol=rounding)
