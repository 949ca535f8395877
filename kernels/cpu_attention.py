"""Attention over a paged cache on a CPU: planned once per step, then a few ops per sequence and layer.

Legend: T = tokens of the step, t = queries of a part, L = keys they see, H = heads, D = head width.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels import kv_codes
from kernels.cpu import rms_norm
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.rotary import HeadNorms, Rotation

# queries of a prompt that share one mask: later keys than the last of them are never touched
QUERY_BLOCK = 256


@dataclass(frozen=True)
class AttentionPart:
    """Queries that are attended in one go: the one new token of a sequence, or a block of its prompt.

    It holds tokens start .. stop of the step. key_rows: int64 [H_kv * L], where each key lies when a cache is seen as
    one list of vectors. visible: bool [t, L], None for a single query, which sees every key.
    """

    start: int
    stop: int
    key_rows: Tensor
    visible: Tensor | None


@dataclass(frozen=True)
class CpuAttentionPlan:
    """What all layers of a step share. write_rows: int64 [T * H_kv], where the new keys go; parts by sliding window."""

    write_rows: Tensor
    parts: dict[int | None, tuple[AttentionPart, ...]]


def plan_attention(batch: AttentionBatch, layer: PagedLayer, windows: Iterable[int | None]) -> CpuAttentionPlan:
    """The plan of a step for layers whose caches have the shape of `layer`, with these sliding windows."""
    return CpuAttentionPlan(
        write_rows=_vector_rows(batch.slot_mapping, layer).flatten(),
        parts={window: tuple(_plan_parts(batch, layer, window or batch.max_context_len)) for window in set(windows)},
    )


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, plan: CpuAttentionPlan) -> None:
    """Write the step's keys and values [T, H_kv, D] into the cache, as codes where it holds codes."""
    rows, width = plan.write_rows, keys.shape[-1]
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    if layer.key_scales is None or layer.value_scales is None:
        for cache, new in ((layer.keys, keys), (layer.values, values)):
            cache.view(-1, width).index_copy_(0, rows, new.to(cache.dtype))
        return
    key_codes, key_scales = kv_codes.encode(keys, layer.keys.dtype)
    value_codes, value_scales = kv_codes.encode(values, layer.values.dtype)
    # bytes: torch indexes no 8-bit floats
    layer.keys.view(torch.uint8).view(-1, width).index_copy_(0, rows, key_codes.view(torch.uint8))
    pairs = layer.values.view(torch.uint8).view(-1, width, 2)
    pairs[rows // 2, :, rows % 2] = value_codes.view(torch.uint8)
    layer.key_scales.view(-1).index_copy_(0, rows, key_scales)
    layer.value_scales.view(-1).index_copy_(0, rows, value_scales)


def rotate_and_write(
    heads: Tensor, rotation: Rotation, norms: HeadNorms | None, layer: PagedLayer, plan: CpuAttentionPlan
) -> Tensor:
    """Norm and rotate the queries and keys among heads [T, H + 2 H_kv, D]; write the keys and values into the cache.

    Returns the queries [T, H, D].
    """
    num_kv_heads = layer.keys.shape[1]
    num_queries = heads.shape[1] - 2 * num_kv_heads
    rotated, values = heads[:, :-num_kv_heads], heads[:, -num_kv_heads:]
    if norms is not None:
        queries, keys = rotated[:, :num_queries], rotated[:, num_queries:]
        rotated = torch.cat(
            (
                rms_norm(queries, norms.query_weight, norms.epsilon),
                rms_norm(keys, norms.key_weight, norms.epsilon),
            ),
            dim=1,
        )
    rotated = _rotate(rotated, rotation)
    write_kv(rotated[:, num_queries:], values, layer, plan)
    return rotated[:, :num_queries]


def _rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Element i of the first R of each head [T, H, D] pairs with element i + R / 2; those after R stay."""
    cosines, signed_sines = rotation.cosines[:, None], rotation.signed_sines[:, None]
    turning, staying = heads.tensor_split([cosines.shape[-1]], dim=-1)
    swapped = torch.roll(turning, turning.shape[-1] // 2, dims=-1)
    turned = torch.addcmul(turning * cosines, swapped, signed_sines)
    return turned if staying.shape[-1] == 0 else torch.cat((turned, staying), dim=-1)


def paged_attention(
    query: Tensor,
    layer: PagedLayer,
    plan: CpuAttentionPlan,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's blocks; [T, H, D]. See `kernels.reference`.

    A slot of the cache is read only by the sequence that wrote it. Each sequence is attended by itself: padding it to
    the longest of the step would let the step's other sequences turn its last bits.
    """
    output = torch.empty(query.shape, dtype=query.dtype)
    num_kv_heads = layer.keys.shape[1]
    for part in plan.parts[sliding_window]:
        keys, values = (
            vectors.view(num_kv_heads, -1, query.shape[-1]) for vectors in _gather(layer, part.key_rows, query.dtype)
        )
        queries = query[part.start : part.stop]
        if soft_cap is not None or sinks is not None:
            attended = _attend_plainly(queries, keys, values, part.visible, softmax_scale, soft_cap, sinks)
        elif part.visible is None:
            # the query heads of a key head take the place of queries of that head: no key is repeated
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries.view(1, num_kv_heads, -1, query.shape[-1]), keys[None], values[None], scale=softmax_scale
            ).view(queries.shape)
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                keys[None],
                values[None],
                attn_mask=part.visible,
                scale=softmax_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        output[part.start : part.stop] = attended
    return output


def _gather(layer: PagedLayer, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [H_kv * L, D] of these rows, in `dtype`."""
    width = layer.keys.shape[-1]
    if layer.key_scales is None or layer.value_scales is None:
        keys, values = (cache.view(-1, width).index_select(0, rows).to(dtype) for cache in (layer.keys, layer.values))
        return keys, values
    key_codes = layer.keys.view(torch.uint8).view(-1, width).index_select(0, rows)
    value_codes = layer.values.view(torch.uint8).view(-1, width, 2)[rows // 2, :, rows % 2]
    keys, values = (
        kv_codes.decode(codes.view(layer.keys.dtype), scales.view(-1).index_select(0, rows)).to(dtype)
        for codes, scales in ((key_codes, layer.key_scales), (value_codes, layer.value_scales))
    )
    return keys, values


def _attend_plainly(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor | None,
    softmax_scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """What torch's own attention lacks, in float32: queries [t, H, D] over keys [H_kv, L, D], to [t, H, D]."""
    num_tokens, num_heads, width = queries.shape
    num_kv_heads = len(keys)
    grouped = queries.float().view(num_tokens, num_kv_heads, -1, width).permute(1, 2, 0, 3)
    logits = grouped @ keys.float()[:, None].transpose(-1, -2) * softmax_scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if visible is not None:
        logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_logits = sinks.float().view(num_kv_heads, -1, 1, 1).expand(-1, -1, num_tokens, 1)
        logits = torch.cat((logits, sink_logits), dim=-1)
    weights = logits.softmax(dim=-1)[..., : keys.shape[1]]
    attended = weights @ values.float()[:, None]
    return attended.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, width).to(queries.dtype)


def _plan_parts(batch: AttentionBatch, layer: PagedLayer, window: int) -> Iterator[AttentionPart]:
    starts, context_lens = batch.query_starts.tolist(), batch.context_lens.tolist()
    for (start, stop), context_len, block_table in zip(pairwise(starts), context_lens, batch.block_tables, strict=True):
        if stop - start == 1:
            keys = torch.arange(max(0, context_len - window), context_len)
            yield AttentionPart(start, stop, _key_rows(block_table, keys, layer), None)
        else:
            yield from _plan_prompt(start, range(context_len - (stop - start), context_len), block_table, layer, window)


def _plan_prompt(
    start: int, positions: range, block_table: Tensor, layer: PagedLayer, window: int
) -> Iterator[AttentionPart]:
    """One sequence's tokens from `start` of the step on, each against its own past: a block of them after the other."""
    for first in range(0, len(positions), QUERY_BLOCK):
        block = positions[first : first + QUERY_BLOCK]
        keys = torch.arange(max(0, block.start - window + 1), block.stop)
        queries = torch.arange(block.start, block.stop)[:, None]
        visible = (keys <= queries) & (keys > queries - window)
        yield AttentionPart(start + first, start + first + len(block), _key_rows(block_table, keys, layer), visible)


def _key_rows(block_table: Tensor, positions: Tensor, layer: PagedLayer) -> Tensor:
    """int64 [H_kv * L] of positions [L] in the sequence that owns the block table."""
    blocks = block_table.long().index_select(0, positions // layer.block_size)
    return _vector_rows(blocks * layer.block_size + positions % layer.block_size, layer).t().flatten()


def _vector_rows(slots: Tensor, layer: PagedLayer) -> Tensor:
    """int64 [L, H_kv] of slots [L]: where each head's vector of a slot lies when the cache is one list of vectors."""
    num_heads, block_size = layer.keys.shape[1:3]
    blocks, offsets = slots[:, None] // block_size, slots[:, None] % block_size
    return (blocks * num_heads + torch.arange(num_heads)) * block_size + offsets
