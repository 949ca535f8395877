"""The checks that the attention wrappers make before they launch: shapes, dtypes, strides, device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.kv_codes import CODE_DTYPES
from kernels.kv_words import Codes
from kernels.launch import IS_INTERPRETED, check_half, launch_arch
from kernels.paged_batch import AttentionBatch, PagedLayer

MAX_HEAD_WIDTH = 256
# a window that no context reaches stands for none; a position less this still fits 32 bits
NO_WINDOW = 2**31 - 1
# the first compute capability, times ten, with an instruction that converts e4m3
FP8_ARCH = 89
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class AttentionOperands:
    """What both attention kernels are launched with. arch: as in `tiles`. group: query heads that share a key head.

    keys, values: of the layer, codes as int16 words. score_scale, soft_cap: as `capped` takes them.
    sliding_window: NO_WINDOW for none.
    """

    arch: int
    query: Tensor
    layer: PagedLayer
    keys: Tensor
    values: Tensor
    codes: Codes | None
    batch: AttentionBatch
    group: int
    score_scale: float
    soft_cap: float | None
    sliding_window: int
    sinks: Tensor | None


def check_attention(
    query: Tensor,
    layer: PagedLayer,
    batch: AttentionBatch,
    *,
    softmax_scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> AttentionOperands:
    """Raises ValueError, saying what would be right, unless the kernels can attend query [T, H, D] to the cache."""
    check_half("query", query)
    num_kv_heads, width = _check_cache(layer, query.dtype)
    if query.ndim != 3 or query.shape[2] != width or query.shape[1] % num_kv_heads:
        raise ValueError(
            f"query must be [T, H, {width}] with H a multiple of the cache's {num_kv_heads} heads, "
            f"not {list(query.shape)}"
        )
    if query.stride(2) != 1:
        raise ValueError(f"the last axis of query must be contiguous; its elements are {query.stride(2)} apart")
    _check_settings(softmax_scale, sliding_window, soft_cap)
    if sinks is not None and (sinks.shape != query.shape[1:2] or not sinks.is_contiguous()):
        raise ValueError(f"sinks must be contiguous [{query.shape[1]}], one per query head, not {list(sinks.shape)}")
    _check_batch(batch)
    tensors = {
        "query": query,
        "query_starts": batch.query_starts,
        "context_lens": batch.context_lens,
        "block_tables": batch.block_tables,
        **({} if sinks is None else {"sinks": sinks}),
    }
    arch = launch_arch(tensors | _cache_tensors(layer))
    codes = codes_of(layer, arch)
    keys, values = (cache if codes is None else cache.view(torch.int16) for cache in (layer.keys, layer.values))
    scale = softmax_scale * _LOG2_E
    return AttentionOperands(
        arch=arch,
        query=query,
        layer=layer,
        keys=keys,
        values=values,
        codes=codes,
        batch=batch,
        group=query.shape[1] // num_kv_heads,
        score_scale=scale if soft_cap is None else 2 * scale / soft_cap,
        soft_cap=None if soft_cap is None else soft_cap * _LOG2_E,
        sliding_window=NO_WINDOW if sliding_window is None else sliding_window,
        sinks=sinks,
    )


def codes_of(layer: PagedLayer, arch: int) -> Codes | None:
    """What the words of the cache hold and how the architecture converts them; None for a cache of no codes."""
    if layer.keys.dtype == torch.uint8:
        return "int8"
    if layer.keys.dtype == torch.float8_e4m3fn:
        return "fp8_native" if arch >= FP8_ARCH and not IS_INTERPRETED else "fp8"
    return None


def check_write(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Raises ValueError unless keys and values [T, H_kv, D] fit the cache and the slots int64 [T]."""
    num_kv_heads, width = _check_cache(layer, keys.dtype)
    check_half("keys", keys)
    for name, new in (("keys", keys), ("values", values)):
        if new.ndim != 3 or new.shape[1:] != (num_kv_heads, width) or new.dtype != keys.dtype:
            raise ValueError(
                f"{name} must be {keys.dtype} [T, {num_kv_heads}, {width}], not {new.dtype} {list(new.shape)}"
            )
        if new.stride()[1:] != (width, 1):
            raise ValueError(f"a token's {name} must be contiguous, not with strides {list(new.stride())}")
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != keys.shape[:1] or len(values) != len(keys):
        raise ValueError(
            f"{len(keys)} keys, {len(values)} values and slots {slot_mapping.dtype} {list(slot_mapping.shape)}: "
            "they must be one int64 slot per key and value"
        )
    launch_arch({"keys": keys, "values": values, "slot_mapping": slot_mapping} | _cache_tensors(layer))


def _check_settings(softmax_scale: float, sliding_window: int | None, soft_cap: float | None) -> None:
    if softmax_scale <= 0:
        raise ValueError(f"softmax_scale must be positive, not {softmax_scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 (the token itself), not {sliding_window}")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, or None for none, not {soft_cap}")


def _check_cache(layer: PagedLayer, dtype: torch.dtype) -> tuple[int, int]:
    """The number of heads and their width, of a cache as `PagedLayer` describes it."""
    keys, values = layer.keys, layer.values
    coded = keys.dtype in CODE_DTYPES
    if keys.ndim != 4 or not all(tensor.is_contiguous() for tensor in _cache_tensors(layer).values()):
        raise ValueError(
            f"the cache must be contiguous, its keys [num_blocks, H_kv, block_size, D], not {list(keys.shape)}"
        )
    num_blocks, num_kv_heads, block_size, width = keys.shape
    if (not coded and keys.dtype != dtype) or values.dtype != keys.dtype:
        raise ValueError(f"the cache must be in the model's {dtype} or in codes, not {keys.dtype} and {values.dtype}")
    if coded and (block_size % 2 or width % 2):
        raise ValueError(f"a cache of codes needs blocks and heads of even size, not {block_size} and {width}")
    value_shape = (num_blocks, num_kv_heads, block_size // 2, width, 2) if coded else keys.shape
    scale_shapes = [None if scales is None else scales.shape for scales in (layer.key_scales, layer.value_scales)]
    if values.shape != value_shape or scale_shapes != 2 * [keys.shape[:3] if coded else None]:
        raise ValueError(
            f"values {list(values.shape)} and the scales do not fit keys {list(keys.shape)} {keys.dtype}: "
            "allocate_layer makes caches that do"
        )
    if width > MAX_HEAD_WIDTH:
        raise ValueError(f"heads wider than {MAX_HEAD_WIDTH} are not supported; these are {width}")
    return num_kv_heads, width


def _cache_tensors(layer: PagedLayer) -> dict[str, Tensor]:
    tensors = {
        "keys of the cache": layer.keys,
        "values of the cache": layer.values,
        "key_scales": layer.key_scales,
        "value_scales": layer.value_scales,
    }
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _check_batch(batch: AttentionBatch) -> None:
    num_sequences = len(batch.context_lens)
    for name, tensor, shape in (
        ("query_starts", batch.query_starts, (num_sequences + 1,)),
        ("context_lens", batch.context_lens, (num_sequences,)),
    ):
        if tensor.dtype != torch.int32 or tensor.shape != shape:
            raise ValueError(f"{name} must be int32 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")
    tables = batch.block_tables
    if tables.dtype != torch.int32 or tables.ndim != 2 or len(tables) != num_sequences:
        raise ValueError(
            f"block_tables must be int32 [{num_sequences}, max_blocks], not {tables.dtype} {list(tables.shape)}"
        )
    if tables.stride(1) != 1:
        raise ValueError(f"a row of block_tables must be contiguous; its entries are {tables.stride(1)} apart")
