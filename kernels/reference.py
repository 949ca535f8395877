"""Each operation in plain torch, in float32: the definition the fast ones are tested against. Slow on purpose."""

import torch
from torch import Tensor

from kernels import kv_codes
from kernels.experts import Routing, SortedRows, num_tiles_of
from kernels.layout import PackedWeight, unpack
from kernels.lora import LoraStack
from kernels.paged_batch import AttentionBatch, PagedLayer


def dequantize(weight: PackedWeight) -> Tensor:
    """A ROW_MAJOR weight as float32 [N, K]: (code - zero) * scale, group by group."""
    plain = unpack(weight)
    groups = plain.codes.view(*plain.scales.shape, plain.group_size).float()
    return groups.sub_(plain.zeros[..., None]).mul_(plain.scales.float()[..., None]).flatten(1)


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] times a ROW_MAJOR weight [N, K] transposed, accumulated in float32, returned in x's dtype [M, N]."""
    bias_float = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), dequantize(weight), bias_float).to(x.dtype)


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Write keys and values [T, H_kv, D] into the slots int64 [T] of the cache, as codes where it holds codes."""
    blocks, offsets = slot_mapping // layer.block_size, slot_mapping % layer.block_size
    if layer.key_scales is None or layer.value_scales is None:
        layer.keys[blocks, :, offsets] = keys.to(layer.keys.dtype)
        layer.values[blocks, :, offsets] = values.to(layer.values.dtype)
        return
    layer.keys[blocks, :, offsets], layer.key_scales[blocks, :, offsets] = kv_codes.encode(keys, layer.keys.dtype)
    codes, layer.value_scales[blocks, :, offsets] = kv_codes.encode(values, layer.values.dtype)
    layer.values[blocks, :, offsets // 2, :, offsets % 2] = codes


def cached_numbers(layer: PagedLayer) -> tuple[Tensor, Tensor]:
    """What the cache holds: keys and values float32 [num_blocks, H_kv, block_size, D]."""
    if layer.key_scales is None or layer.value_scales is None:
        return layer.keys.float(), layer.values.float()
    values = layer.values.transpose(-1, -2).flatten(2, 3)
    return kv_codes.decode(layer.keys, layer.key_scales), kv_codes.decode(values, layer.value_scales)


def paged_attention(
    query: Tensor,
    layer: PagedLayer,
    batch: AttentionBatch,
    *,
    softmax_scale: float,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of query [T, H, D] over each sequence's blocks; grouped-query heads share H / H_kv to one.

    With a sliding window, a token sees itself and the `sliding_window - 1` tokens before it. With a soft cap, a scaled
    score x becomes soft_cap * tanh(x / soft_cap). Sinks [H] are logits, one per head, that take their share of the
    softmax and give no value. Returns [T, H, D].
    """
    output = torch.empty_like(query)
    num_query_heads, num_kv_heads = query.shape[1], layer.keys.shape[1]
    cached = cached_numbers(layer)
    for sequence in range(len(batch.context_lens)):
        start, stop = int(batch.query_starts[sequence]), int(batch.query_starts[sequence + 1])
        context_len = int(batch.context_lens[sequence])
        num_blocks = -(-context_len // layer.block_size)
        blocks = batch.block_tables[sequence, :num_blocks].long()
        keys, values = (
            numbers[blocks]
            .transpose(0, 1)
            .flatten(1, 2)[:, :context_len]
            .repeat_interleave(num_query_heads // num_kv_heads, dim=0)
            for numbers in cached
        )
        scores = torch.einsum("thd,hkd->htk", query[start:stop].float(), keys) * softmax_scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        query_positions = torch.arange(context_len - (stop - start), context_len, device=query.device)[:, None]
        key_positions = torch.arange(context_len, device=query.device)[None, :]
        visible = key_positions <= query_positions
        if sliding_window is not None:
            visible &= key_positions > query_positions - sliding_window
        logits = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            logits = torch.cat((logits, sinks.float()[:, None, None].expand(-1, stop - start, 1)), dim=-1)
        weights = logits.softmax(dim=-1)[..., :context_len]
        output[start:stop] = torch.einsum("htk,hkd->thd", weights, values).to(output.dtype)
    return output


def route(logits: Tensor, num_choices: int, *, renormalized: bool) -> Routing:
    """The likeliest C of E experts for logits [T, E], of equal ones the first, with their softmax in float32.

    renormalized: the weights of a token's choices are divided by their sum.
    """
    probabilities = logits.float().softmax(dim=-1)
    likeliest = probabilities.sort(dim=-1, descending=True, stable=True)
    weights = likeliest.values[:, :num_choices]
    if renormalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(likeliest.indices[:, :num_choices].contiguous(), weights.contiguous())


def sorted_by_expert(experts: Tensor, num_experts: int, max_tile_rows: int) -> SortedRows:
    """The assignments of each expert in tiles, for the choices experts int64 [T, C]."""
    by_expert = experts.flatten().sort(stable=True)
    counts = torch.bincount(by_expert.values, minlength=num_experts)
    ends = counts.cumsum(0)
    tiles = (counts + max_tile_rows - 1) // max_tile_rows
    tile_ends = tiles.cumsum(0)
    indices = torch.arange(num_tiles_of(experts.numel(), num_experts, max_tile_rows), device=experts.device)
    tile_experts = torch.searchsorted(tile_ends, indices, right=True).clamp_(max=num_experts - 1)
    index_in_expert = indices - (tile_ends - tiles)[tile_experts]
    first_rows = (ends - counts)[tile_experts] + index_in_expert * max_tile_rows
    # a tile past the last has the last expert, and begins at or behind its end
    last_rows = torch.minimum(first_rows + max_tile_rows, ends[tile_experts])
    return SortedRows(
        order=by_expert.indices.to(torch.int32),
        tile_experts=tile_experts.to(torch.int32),
        tile_rows=torch.stack((first_rows, last_rows), dim=1).to(torch.int32),
        max_tile_rows=max_tile_rows,
        num_experts=num_experts,
    )


def grouped_linear(x: Tensor, weights: list[PackedWeight], experts: Tensor) -> Tensor:
    """Row a // (A / rows of x) of x times the ROW_MAJOR weight of expert experts[a], for each of A: [A, N]."""
    repeats = len(experts) // len(x)
    rows = [quantized_linear(x[a // repeats][None], weights[int(expert)]) for a, expert in enumerate(experts.tolist())]
    return torch.cat(rows)


def sum_choices(choices: Tensor, router: Tensor) -> Tensor:
    """choices [T * C, N] weighted by router [T, C], summed over C in float32: [T, N] in the dtype of the choices."""
    weighted = choices.float().view(*router.shape, -1) * router[..., None]
    return weighted.sum(dim=1).to(choices.dtype)


def add_lora(out: Tensor, x: Tensor, stack: LoraStack, adapters: Tensor) -> Tensor:
    """out [T, N] with what the adapters int64 [T] of its rows make of x [T, K] added; -1 is a row that has none.

    Products in float32; what is between the two, and the sum, are rounded to x's dtype.
    """
    total = out.clone()
    for row, adapter in enumerate(adapters.tolist()):
        if adapter < 0:
            continue
        inner = (stack.down[adapter].float() @ x[row].float()).to(x.dtype).float().view(-1, stack.rank)
        ups = torch.split(stack.up[adapter].float(), list(stack.part_widths))
        added = torch.cat([up @ of_part for up, of_part in zip(ups, inner, strict=True)])
        total[row] = (total[row].float() + added).to(out.dtype)
    return total
