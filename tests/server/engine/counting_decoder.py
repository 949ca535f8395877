"""A decoder of whole numbers: its next token is a function of every token of the text, whatever order sums take.

Device work alone, so that it can be recorded. Legend: T = tokens of the step, B = sequences, L = slots of a table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.paged_batch import AttentionBatch, PagedLayer
from tests.fakes import FAKE_VOCAB_SIZE


def value_of(token: int, position: int) -> int:
    """What a token writes to its slot."""
    return (31 * token + 17 * position) % 101


def weight_of(position: int) -> int:
    """What a slot's value counts, by its place in the text."""
    return position * 13 % 7 + 1


def next_token(text: Sequence[int]) -> int:
    """The token that follows: what the decoder's largest logit is at."""
    total = sum(weight_of(position) * value_of(token, position) for position, token in enumerate(text))
    return (7 * total + text[-1]) % FAKE_VOCAB_SIZE


def number_cache(num_blocks: int, block_size: int) -> PagedLayer:
    """A cache for one number a token, full of NaN: to read what nobody wrote shows."""
    return PagedLayer(*(torch.full((num_blocks, 1, block_size, 1), float("nan"), dtype=torch.float64) for _ in "kv"))


class CountingDecoder:
    """In the place of a `Decoder` of one layer and hidden states of one number: the next token."""

    def __init__(self) -> None:
        self.embedding = torch.zeros(FAKE_VOCAB_SIZE, 1, dtype=torch.float64)

    def forward(
        self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, kv_layers: Sequence[PagedLayer]
    ) -> Tensor:
        """The next token after each of the step's tokens int64 [T], float64 [T, 1]."""
        numbers = kv_layers[0].keys
        numbers.view(-1).index_copy_(0, batch.slot_mapping, ((31 * token_ids + 17 * positions) % 101).double())
        tokens = torch.arange(len(token_ids))
        sequences = torch.searchsorted(batch.query_starts[1:].contiguous(), tokens.int(), right=True)
        # what pads a table names a block, too
        texts = numbers.flatten(1)[batch.block_tables[sequences].long()].flatten(1)
        places = torch.arange(texts.shape[1])
        is_seen = (places <= positions[:, None]) & (places < batch.context_lens[sequences][:, None])
        totals = torch.where(is_seen, (places * 13 % 7 + 1) * texts, 0.0).sum(dim=1)
        return ((7 * totals + token_ids) % FAKE_VOCAB_SIZE)[:, None]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab], by far largest at the next token, then at the one after it, and so on around."""
        return -1000 * ((torch.arange(FAKE_VOCAB_SIZE) - hidden) % FAKE_VOCAB_SIZE).float()
