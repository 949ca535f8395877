"""Norm and rotation of queries and keys, and the write of keys and values into the paged cache, in one launch.

Legend: T = tokens of the step, H = query heads, H_kv = key/value heads, D = head width, R = rotated elements of a head.
"""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_operands import check_write, codes_of
from kernels.kv_codes import CODE_DTYPES
from kernels.kv_words import encode_rows
from kernels.launch import FUSE_FLOATS, check_half, launch_arch, rounded
from kernels.paged_batch import PagedLayer
from kernels.rotary import HeadNorms, Rotation
from kernels.tiles import COPY_WARPS, head_tile


@triton.jit
def rotate_and_write_kernel(
    heads_ptr: tl.tensor,
    cosines_ptr: tl.tensor,
    signed_sines_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    queries_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    token_stride: tl.tensor,
    rotation_stride: tl.tensor,
    block_stride: tl.tensor,
    epsilon: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    ROTARY_WIDTH: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
    CODES: tl.constexpr,
) -> None:
    """Program (token, key head): its GROUP query heads to queries [T, H, D], its key and its value to their slot.

    heads [T, H + 2 H_kv, D] with tokens token_stride apart; cosines, signed_sines [T, R] with rows rotation_stride
    apart; the cache as in `PagedLayer`, codes as bytes. The weights of the norms [D] are both None or neither is.
    """
    token = tl.program_id(0).to(tl.int64)
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    first_key = num_kv_heads * GROUP
    token_ptr = heads_ptr + token * token_stride
    cosines_ptr += token * rotation_stride
    signed_sines_ptr += token * rotation_stride
    rows = tl.arange(0, TILE_HEADS)
    width = tl.arange(0, TILE_WIDTH)
    queries = rotated_heads(
        token_ptr + kv_head * (GROUP * HEAD_WIDTH),
        (rows < GROUP)[:, None],
        rows[:, None],
        cosines_ptr,
        signed_sines_ptr,
        query_weight_ptr,
        epsilon,
        HEAD_WIDTH,
        ROTARY_WIDTH,
        TILE_WIDTH,
    )
    query_offsets = (token * first_key + kv_head * GROUP + rows[:, None]) * HEAD_WIDTH + width[None, :]
    query_mask = (rows < GROUP)[:, None] & (width < HEAD_WIDTH)[None, :]
    tl.store(queries_ptr + query_offsets, rounded(queries, queries_ptr.dtype.element_ty), mask=query_mask)
    one = tl.arange(0, 1)[:, None]
    key = rotated_heads(
        token_ptr + (first_key + kv_head) * HEAD_WIDTH,
        one == 0,
        one,
        cosines_ptr,
        signed_sines_ptr,
        key_weight_ptr,
        epsilon,
        HEAD_WIDTH,
        ROTARY_WIDTH,
        TILE_WIDTH,
    )
    slot = tl.load(slots_ptr + token)
    cache_offset = slot // BLOCK_SIZE * block_stride + (kv_head * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_WIDTH
    key_mask = (one == 0) & (width < HEAD_WIDTH)[None, :]
    value_offsets = (first_key + num_kv_heads + kv_head) * HEAD_WIDTH + width[None, :]
    value = tl.load(token_ptr + value_offsets, mask=key_mask, other=0.0)
    key = rounded(key, heads_ptr.dtype.element_ty)
    if CODES is None:
        tl.store(keys_ptr + cache_offset + width[None, :], key, mask=key_mask)
        tl.store(values_ptr + cache_offset + width[None, :], value, mask=key_mask)
    else:
        row = cache_offset // HEAD_WIDTH
        key_codes, key_scale = encode_rows(tl.where(key_mask, key.to(tl.float32), 0.0), CODES)
        value_codes, value_scale = encode_rows(value.to(tl.float32), CODES)
        tl.store(keys_ptr + cache_offset + width[None, :], key_codes, mask=key_mask)
        # the values of an even token and of the next lie side by side
        tl.store(values_ptr + (row // 2 * HEAD_WIDTH + width[None, :]) * 2 + slot % 2, value_codes, mask=key_mask)
        tl.store(key_scales_ptr + row + tl.arange(0, 1), key_scale)
        tl.store(value_scales_ptr + row + tl.arange(0, 1), value_scale)


@triton.jit
def rotated_heads(
    heads_ptr: tl.tensor,
    is_real: tl.tensor,
    rows: tl.tensor,
    cosines_ptr: tl.tensor,
    signed_sines_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    epsilon: tl.tensor,
    HEAD_WIDTH: tl.constexpr,
    ROTARY_WIDTH: tl.constexpr,
    TILE_WIDTH: tl.constexpr,
) -> tl.tensor:
    """Heads `rows` [rows, 1] of one token, normalized where there is a weight [D], and rotated: float32 [rows, D]."""
    HALF: tl.constexpr = ROTARY_WIDTH // 2
    dtype: tl.constexpr = heads_ptr.dtype.element_ty
    width = tl.arange(0, TILE_WIDTH)[None, :]
    inside = width < HEAD_WIDTH
    is_rotated = width < ROTARY_WIDTH
    # where the other element of each pair is; elements that do not turn have none
    partners = tl.where(width < HALF, width + HALF, width - HALF)
    head_ptr = heads_ptr + rows * HEAD_WIDTH
    values = tl.load(head_ptr + width, mask=is_real & inside, other=0.0).to(tl.float32)
    others = tl.load(head_ptr + partners, mask=is_real & is_rotated, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scales = 1.0 / tl.sqrt_rn(tl.sum(values * values, 1) / HEAD_WIDTH + epsilon)[:, None]
        weights = tl.load(weight_ptr + width, mask=inside, other=0.0).to(tl.float32)
        other_weights = tl.load(weight_ptr + partners, mask=is_rotated, other=0.0).to(tl.float32)
        # rounded as a norm of its own would be
        values = rounded(values * scales * weights, dtype).to(tl.float32)
        others = rounded(others * scales * other_weights, dtype).to(tl.float32)
    cosines = tl.load(cosines_ptr + width, mask=is_rotated, other=1.0).to(tl.float32)
    signed_sines = tl.load(signed_sines_ptr + width, mask=is_rotated, other=0.0).to(tl.float32)
    return tl.where(is_rotated, values * cosines + others * signed_sines, values)


def rotate_and_write(
    heads: Tensor, rotation: Rotation, norms: HeadNorms | None, layer: PagedLayer, slot_mapping: Tensor
) -> Tensor:
    """Norm and rotate the queries and keys among heads [T, H + 2 H_kv, D]; write keys and values into slots int64 [T].

    heads: queries, then keys, then values, fp16 or bf16. Returns the queries [T, H, D] in their dtype. All is computed
    in float32. Raises ValueError for operands that do not fit.
    """
    num_queries = _check_heads(heads, rotation, norms, layer, slot_mapping)
    num_tokens, _, width = heads.shape
    num_kv_heads = layer.keys.shape[1]
    # encoding is the same for all architectures
    codes = codes_of(layer, arch=0)
    queries = torch.empty((num_tokens, num_queries, width), dtype=heads.dtype, device=heads.device)
    if num_tokens == 0:
        return queries
    rotate_and_write_kernel[(num_tokens, num_kv_heads)](
        heads,
        rotation.cosines,
        rotation.signed_sines,
        None if norms is None else norms.query_weight,
        None if norms is None else norms.key_weight,
        queries,
        *(cache if codes is None else cache.view(torch.uint8) for cache in (layer.keys, layer.values)),
        layer.key_scales,
        layer.value_scales,
        slot_mapping,
        heads.stride(0),
        rotation.cosines.stride(0),
        layer.keys.stride(0),
        0.0 if norms is None else norms.epsilon,
        GROUP=num_queries // num_kv_heads,
        BLOCK_SIZE=layer.block_size,
        HEAD_WIDTH=width,
        ROTARY_WIDTH=rotation.cosines.shape[1],
        TILE_HEADS=triton.next_power_of_2(num_queries // num_kv_heads),
        TILE_WIDTH=head_tile(width),
        CODES=codes,
        num_warps=COPY_WARPS,
        enable_fp_fusion=FUSE_FLOATS,
    )
    return queries


def _check_heads(
    heads: Tensor, rotation: Rotation, norms: HeadNorms | None, layer: PagedLayer, slot_mapping: Tensor
) -> int:
    """How many query heads there are. Raises ValueError unless all operands fit each other."""
    check_half("heads", heads)
    num_kv_heads = layer.keys.shape[1]
    if heads.ndim != 3 or heads.shape[1] <= 2 * num_kv_heads or heads.shape[1] % num_kv_heads:
        raise ValueError(
            f"heads must be [T, H + {2 * num_kv_heads}, D] with H a multiple of the cache's {num_kv_heads} heads, "
            f"not {list(heads.shape)}"
        )
    if layer.keys.dtype not in (heads.dtype, *CODE_DTYPES):
        raise ValueError(f"the cache must be in the dtype of heads, {heads.dtype}, or codes, not {layer.keys.dtype}")
    num_queries = heads.shape[1] - 2 * num_kv_heads
    check_write(heads[:, num_queries:-num_kv_heads], heads[:, -num_kv_heads:], layer, slot_mapping)
    _check_rotation(rotation, heads)
    if norms is not None:
        for name, weight in (("query_weight", norms.query_weight), ("key_weight", norms.key_weight)):
            if weight.shape != heads.shape[2:] or weight.stride(0) != 1:
                raise ValueError(f"{name} must be contiguous [{heads.shape[2]}], not {list(weight.shape)}")
            launch_arch({"heads": heads, name: weight})
    return num_queries


def _check_rotation(rotation: Rotation, heads: Tensor) -> None:
    cosines, signed_sines = rotation.cosines, rotation.signed_sines
    if cosines.ndim != 2 or len(cosines) != len(heads) or cosines.shape != signed_sines.shape:
        raise ValueError(
            f"cosines and signed_sines must be [{len(heads)}, R], one row per token, "
            f"not {list(cosines.shape)} and {list(signed_sines.shape)}"
        )
    rotary_width = cosines.shape[1]
    if rotary_width % 2 or not 2 <= rotary_width <= heads.shape[2]:
        raise ValueError(f"an even number of a head's {heads.shape[2]} elements is rotated, not {rotary_width}")
    if cosines.stride() != signed_sines.stride() or cosines.stride(1) != 1:
        raise ValueError(
            "rows of cosines and signed_sines must be contiguous and equally far apart, "
            f"not with strides {cosines.stride()} and {signed_sines.stride()}"
        )
    launch_arch({"heads": heads, "cosines": cosines, "signed_sines": signed_sines})
