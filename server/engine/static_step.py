"""The operands of a recorded decoding step: tensors that stay where they are, filled by one copy a step."""

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.paged_batch import AttentionBatch
from server.engine.graph_sizes import GraphSize
from server.engine.step_plan import StepPlan
from server.engine.step_tensors import token_slots

# words of 32 bits. Operands start at multiples of 16 bytes, as those of a step that is not recorded do: kernels are
# compiled for that
_ALIGNMENT = 4


@dataclass(frozen=True)
class _Layout:
    """Which words of 32 bits the operands take, one after the other.

    token_ids, positions, slots: int64 [B]. context_lens: int32 [B]. block_tables: int32 [B, width].
    """

    token_ids: range
    positions: range
    slots: range
    context_lens: range
    block_tables: range
    shape: tuple[int, int]

    @property
    def num_words(self) -> int:
        return self.block_tables.stop


def _lay_out(size: GraphSize, block_size: int) -> _Layout:
    shape = (size.num_seqs, -(-size.context_len // block_size))
    counts = [2 * size.num_seqs] * 3 + [size.num_seqs, shape[0] * shape[1]]
    lengths = [-(-count // _ALIGNMENT) * _ALIGNMENT for count in counts]
    starts = [0, *accumulate(lengths)]
    token_ids, positions, slots, context_lens, block_tables = (
        range(start, start + count) for start, count in zip(starts, counts, strict=False)
    )
    return _Layout(token_ids, positions, slots, context_lens, block_tables, shape)


def num_words(size: GraphSize, block_size: int) -> int:
    """Words of 32 bits that the operands of such a step take."""
    return _lay_out(size, block_size).num_words


class StaticStep:
    """A step of at most size.num_seqs sequences, one token each; what is not filled by them is padding.

    Padding reads and writes nothing but the first slot of scratch_block, which no sequence is given: each of its rows
    is a sequence of one token.
    """

    def __init__(
        self, size: GraphSize, words: Tensor, query_starts: Tensor, block_size: int, scratch_block: int
    ) -> None:
        """words: `num_words` int32 on the device, or more, which other steps may share. query_starts: 0, 1, 2, ..."""
        self._block_size = block_size
        self._layout = layout = _lay_out(size, block_size)
        self._words = words[: layout.num_words]
        self._padding = _padding(layout, scratch_block, block_size)
        self.token_ids = words[layout.token_ids.start : layout.token_ids.stop].view(torch.int64)
        self.positions = words[layout.positions.start : layout.positions.stop].view(torch.int64)
        self.batch = AttentionBatch(
            query_starts=query_starts[: size.num_seqs + 1],
            context_lens=words[layout.context_lens.start : layout.context_lens.stop],
            block_tables=words[layout.block_tables.start : layout.block_tables.stop].view(layout.shape),
            slot_mapping=words[layout.slots.start : layout.slots.stop].view(torch.int64),
            max_query_len=1,
            max_context_len=size.context_len,
        )
        self._copy(self._pin())

    def fill(self, plan: StepPlan, sequences: range) -> None:
        """Copy what the plan says of these sequences, each of one token, to the device, without waiting for it."""
        layout, num_seqs = self._layout, len(sequences)
        pinned = self._pin()
        words: NDArray[np.int32] = pinned.numpy()
        tokens = slice(plan.query_starts[sequences.start], plan.query_starts[sequences.stop])
        rows = slice(sequences.start, sequences.stop)
        # a plan's tables may be wider than the longest of these sequences needs
        block_tables = plan.block_tables[rows, : layout.shape[1]]
        positions = plan.positions[tokens]
        slots = token_slots(block_tables, np.arange(num_seqs), positions, self._block_size)
        _part(words, layout.token_ids).view(np.int64)[:num_seqs] = plan.token_ids[tokens]
        _part(words, layout.positions).view(np.int64)[:num_seqs] = positions
        _part(words, layout.slots).view(np.int64)[:num_seqs] = slots
        _part(words, layout.context_lens)[:num_seqs] = plan.context_lens[rows]
        _part(words, layout.block_tables).reshape(layout.shape)[:num_seqs, : block_tables.shape[1]] = block_tables
        self._copy(pinned)

    def _pin(self) -> Tensor:
        """Words on the host, of padding alone; pinned for a GPU."""
        # taken anew each time: the allocator of pinned memory keeps it until the copy from it is over
        words = torch.empty(self._layout.num_words, dtype=torch.int32, pin_memory=self._words.is_cuda)
        words.numpy()[:] = self._padding
        return words

    def _copy(self, words: Tensor) -> None:
        self._words.copy_(words, non_blocking=self._words.is_cuda)


def _padding(layout: _Layout, scratch_block: int, block_size: int) -> NDArray[np.int32]:
    words = np.zeros(layout.num_words, dtype=np.int32)
    _part(words, layout.slots).view(np.int64)[:] = scratch_block * block_size
    _part(words, layout.context_lens)[:] = 1
    _part(words, layout.block_tables).reshape(layout.shape)[:, 0] = scratch_block
    return words


def _part(words: NDArray[np.int32], part: range) -> NDArray[np.int32]:
    return words[part.start : part.stop]
