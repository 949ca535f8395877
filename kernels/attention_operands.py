"""The checks that the attention wrappers make before they launch: shapes, dtypes, strides, device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import check_half, launch_arch
from kernels.paged_batch import AttentionBatch, PagedLayer

MAX_HEAD_WIDTH = 256
# a window that no context reaches stands for none; a position less this still fits 32 bits
NO_WINDOW = 2**31 - 1


@dataclass(frozen=True)
class AttentionOperands:
    """What both attention kernels are launched with. group: query heads that share a key head.

    exponent_scale: the softmax scale times log2(e), for exp2. sliding_window: NO_WINDOW for none.
    """

    query: Tensor
    layer: PagedLayer
    batch: AttentionBatch
    group: int
    exponent_scale: float
    sliding_window: int


def check_attention(
    query: Tensor, layer: PagedLayer, batch: AttentionBatch, *, softmax_scale: float, sliding_window: int | None
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
    if softmax_scale <= 0:
        raise ValueError(f"softmax_scale must be positive, not {softmax_scale}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1 (the token itself), not {sliding_window}")
    _check_batch(batch)
    launch_arch(
        {
            "query": query,
            "keys": layer.keys,
            "values": layer.values,
            "query_starts": batch.query_starts,
            "context_lens": batch.context_lens,
            "block_tables": batch.block_tables,
        }
    )
    return AttentionOperands(
        query=query,
        layer=layer,
        batch=batch,
        group=query.shape[1] // num_kv_heads,
        exponent_scale=softmax_scale * math.log2(math.e),
        sliding_window=NO_WINDOW if sliding_window is None else sliding_window,
    )


def check_write(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Raises ValueError unless keys and values [T, H_kv, D] fit the cache and the slots int64 [T]."""
    num_kv_heads, width = _check_cache(layer, keys.dtype)
    for name, new in (("keys", keys), ("values", values)):
        if new.ndim != 3 or new.shape[1:] != (num_kv_heads, width) or new.dtype != layer.keys.dtype:
            raise ValueError(
                f"{name} must be {layer.keys.dtype} [T, {num_kv_heads}, {width}], not {new.dtype} {list(new.shape)}"
            )
        if new.stride()[1:] != (width, 1):
            raise ValueError(f"a token's {name} must be contiguous, not with strides {list(new.stride())}")
    if slot_mapping.dtype != torch.int64 or slot_mapping.shape != keys.shape[:1] or len(values) != len(keys):
        raise ValueError(
            f"{len(keys)} keys, {len(values)} values and slots {slot_mapping.dtype} {list(slot_mapping.shape)}: "
            "they must be one int64 slot per key and value"
        )
    launch_arch({"keys": keys, "values": values, "cache": layer.keys, "slot_mapping": slot_mapping})


def _check_cache(layer: PagedLayer, dtype: torch.dtype) -> tuple[int, int]:
    """The number of heads and their width, of a cache that is contiguous [num_blocks, H_kv, block_size, D]."""
    keys, values = layer.keys, layer.values
    if keys.ndim != 4 or keys.shape != values.shape or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            "the caches of keys and values must be contiguous [num_blocks, H_kv, block_size, D] of one shape, "
            f"not {list(keys.shape)} and {list(values.shape)}"
        )
    if keys.dtype != dtype or values.dtype != dtype:
        raise ValueError(f"the cache must be in the model's {dtype}, not {keys.dtype} and {values.dtype}")
    if keys.shape[3] > MAX_HEAD_WIDTH:
        raise ValueError(f"heads wider than {MAX_HEAD_WIDTH} are not supported; these are {keys.shape[3]}")
    return keys.shape[1], keys.shape[3]


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
