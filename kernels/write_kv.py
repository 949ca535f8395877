"""The write of a step's keys and values into the paged cache: a copy, or codes of 8 bits with their scales.

Legend: T = tokens of the step, H_kv = key/value heads, D = head width.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_operands import check_write, codes_of
from kernels.kv_words import encode_rows
from kernels.launch import FUSE_FLOATS
from kernels.paged_batch import PagedLayer
from kernels.tiles import COPY_WARPS, head_tile


@triton.jit
def write_kv_kernel(
    new_keys_ptr: tl.tensor,
    new_values_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """Program (token) writes its keys and values [H_kv, D] into slot block * BLOCK_SIZE + offset of the cache.

    The cache as in `PagedLayer`, codes as bytes.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.arange(0, TILE_HEADS)
    width = tl.arange(0, TILE_WIDTH)[None, :]
    mask = (heads < NUM_HEADS)[:, None] & (width < HEAD_WIDTH)
    source = heads[:, None] * HEAD_WIDTH + width
    keys = tl.load(new_keys_ptr + token * key_stride + source, mask=mask, other=0.0)
    values = tl.load(new_values_ptr + token * value_stride + source, mask=mask, other=0.0)
    rows = (slot // BLOCK_SIZE * NUM_HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    if CODES is None:
        tl.store(keys_ptr + rows[:, None] * HEAD_WIDTH + width, keys, mask=mask)
        tl.store(values_ptr + rows[:, None] * HEAD_WIDTH + width, values, mask=mask)
    else:
        key_codes, key_scales = encode_rows(keys.to(tl.float32), CODES)
        value_codes, value_scales = encode_rows(values.to(tl.float32), CODES)
        tl.store(keys_ptr + rows[:, None] * HEAD_WIDTH + width, key_codes, mask=mask)
        # the values of an even token and of the next lie side by side
        pairs = (rows // 2)[:, None] * HEAD_WIDTH + width
        tl.store(values_ptr + pairs * 2 + slot % 2, value_codes, mask=mask)
        tl.store(key_scales_ptr + rows, key_scales, mask=heads < NUM_HEADS)
        tl.store(value_scales_ptr + rows, value_scales, mask=heads < NUM_HEADS)


def write_kv(keys: Tensor, values: Tensor, layer: PagedLayer, slot_mapping: Tensor) -> None:
    """Write keys and values [T, H_kv, D] into the slots int64 [T], as the cache stores them. Raises ValueError."""
    check_write(keys, values, layer, slot_mapping)
    num_tokens, num_heads, width = keys.shape
    if num_tokens == 0:
        return
    # encoding is the same for all architectures
    codes = codes_of(layer, arch=0)
    cache = [tensor if codes is None else tensor.view(torch.uint8) for tensor in (layer.keys, layer.values)]
    write_kv_kernel[(num_tokens,)](
        keys,
        values,
        *cache,
        layer.key_scales,
        layer.value_scales,
        slot_mapping,
        keys.stride(0),
        values.stride(0),
        NUM_HEADS=num_heads,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        TILE_HEADS=triton.next_power_of_2(num_heads),
        TILE_WIDTH=head_tile(width),
        CODES=codes,
        num_warps=COPY_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
