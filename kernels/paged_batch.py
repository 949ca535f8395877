"""What attention over a paged KV cache needs: the cache of one layer, and which tokens see which blocks.

Legend: T = tokens of the step, B = sequences of the step, H = query heads, H_kv = key/value heads, D = head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PagedLayer:
    """One layer's cache, in the model's dtype or in codes of 8 bits (see `kv_codes`).

    In the model's dtype: keys and values [num_blocks, H_kv, block_size, D], no scales.
    In codes: keys [num_blocks, H_kv, block_size, D] and values [num_blocks, H_kv, block_size / 2, D, 2], uint8 or
    float8_e4m3fn; scales float32 [num_blocks, H_kv, block_size], one per token and head. The values of two neighbouring
    tokens lie side by side, so that a 16-bit word of them is two summands of one output, as one of keys is.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]


def copy_block(layer: PagedLayer, source: int, target: int) -> None:
    """Give one block of a layer what another holds."""
    for tensor in (layer.keys, layer.values, layer.key_scales, layer.value_scales):
        if tensor is not None:
            tensor[target].copy_(tensor[source])


def allocate_layer(
    num_blocks: int, num_kv_heads: int, block_size: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> PagedLayer:
    """A cache with nothing written: zeros are not needed, since no slot is read before it is written.

    dtype: float, or one of `kv_codes.CODE_DTYPES`. Raises ValueError for an odd block_size of codes.
    """
    shape = (num_blocks, num_kv_heads, block_size, width)
    if dtype.itemsize > 1:
        return PagedLayer(
            torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device)
        )
    if block_size % 2:
        raise ValueError(f"a block of an 8-bit cache must hold an even number of tokens, not {block_size}")
    return PagedLayer(
        keys=torch.empty(shape, dtype=dtype, device=device),
        values=torch.empty((*shape[:2], block_size // 2, width, 2), dtype=dtype, device=device),
        key_scales=torch.empty(shape[:3], dtype=torch.float32, device=device),
        value_scales=torch.empty(shape[:3], dtype=torch.float32, device=device),
    )


@dataclass(frozen=True)
class AttentionBatch:
    """The sequences of one step. Tokens of a sequence are neighbours; its new tokens are the last of its context.

    query_starts: int32 [B + 1], sequence b owns tokens query_starts[b] .. query_starts[b + 1] of the step.
    context_lens: int32 [B], tokens of the sequence in the cache once this step's are written.
    block_tables: int32 [B, max_blocks], token at position p lives in block block_tables[b, p // block_size].
    slot_mapping: int64 [T], block * block_size + offset where each token's key and value are written.
    max_query_len, max_context_len: the largest of the batch, on the host (they size the launch).
    """

    query_starts: Tensor
    context_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor
    max_query_len: int
    max_context_len: int
