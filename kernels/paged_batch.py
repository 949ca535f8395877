"""What attention over a paged KV cache needs: the cache of one layer, and which tokens see which blocks.

Legend: T = tokens of the step, B = sequences of the step, H = query heads, H_kv = key/value heads, D = head width.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedLayer:
    """One layer's cache: keys and values [num_blocks, H_kv, block_size, D], in the model's dtype."""

    keys: Tensor
    values: Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[2]


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
