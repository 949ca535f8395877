"""The operands of a recorded decoding step: tensors that stay where they are, filled by one copy a step."""

from dataclasses import dataclass

import numpy as np
import torch
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
    """Where the operands lie among the words: first words of each, and their number altogether.

    token_ids, positions, slots: int64 [B]. context_lens: int32 [B]. block_tables: int32 [B, width].
    """

    num_seqs: int
    width: int

    @property
    def starts(self) -> tuple[int, ...]:
        row, wide_row = _aligned(self.num_seqs), _aligned(2 * self.num_seqs)
        return (0, wide_row, 2 * wide_row, 3 * wide_row, 3 * wide_row + row)

    @property
    def num_words(self) -> int:
        return self.starts[-1] + _aligned(self.num_seqs * self.width)

    def views(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token ids, positions, slots, context lengths and block tables among int32 words."""
        token_ids, positions, slots = (
            words[start : start + 2 * self.num_seqs].view(torch.int64) for start in self.starts[:3]
        )
        lens_start, tables_start = self.starts[3:]
        context_lens = words[lens_start : lens_start + self.num_seqs]
        tables = words[tables_start : tables_start + self.num_seqs * self.width].view(self.num_seqs, self.width)
        return token_ids, positions, slots, context_lens, tables


class StaticStep:
    """A step of at most size.num_seqs sequences, one token each; what is not filled by them is padding.

    Padding reads and writes nothing but the first slot of scratch_block, which no sequence is given: each of its rows
    is a sequence of one token.
    """

    def __init__(
        self, size: GraphSize, words: Tensor, query_starts: Tensor, block_size: int, scratch_block: int
    ) -> None:
        """words: `num_words` int32 on the device, or more, which other steps may share. query_starts: 0, 1, 2, ..."""
        self._block_size, self._scratch_block = block_size, scratch_block
        self._layout = _layout(size, block_size)
        self._words = words[: self._layout.num_words]
        self.token_ids, self.positions, slots, context_lens, block_tables = self._layout.views(words)
        self.batch = AttentionBatch(
            query_starts=query_starts[: size.num_seqs + 1],
            context_lens=context_lens,
            block_tables=block_tables,
            slot_mapping=slots,
            max_query_len=1,
            max_context_len=size.context_len,
        )

    def fill(self, plan: StepPlan, sequences: range) -> None:
        """Copy what the plan says of these sequences, each of one token, to the device, without waiting for it."""
        num_seqs = len(sequences)
        words = self._padding()
        token_ids, positions, slots, context_lens, tables = (
            view.numpy()[:num_seqs] for view in self._layout.views(words)
        )
        tokens = slice(plan.query_starts[sequences.start], plan.query_starts[sequences.stop])
        token_ids[:] = plan.token_ids[tokens]
        positions[:] = plan.positions[tokens]
        context_lens[:] = plan.context_lens[sequences.start : sequences.stop]
        # a plan's tables may be wider than the longest of these sequences needs
        plan_tables = plan.block_tables[sequences.start : sequences.stop, : self._layout.width]
        tables[:, : plan_tables.shape[1]] = plan_tables
        tables[:, plan_tables.shape[1] :] = 0
        slots[:] = token_slots(plan_tables, np.arange(num_seqs), plan.positions[tokens], self._block_size)
        self._copy(words)

    def clear(self) -> None:
        """Let all be padding."""
        self._copy(self._padding())

    def _padding(self) -> Tensor:
        """Words on the host, of padding alone; pinned for a GPU."""
        # taken anew each time: the allocator of pinned memory keeps it until the copy from it is over
        words = torch.zeros(self._layout.num_words, dtype=torch.int32, pin_memory=self._words.is_cuda)
        _, _, slots, context_lens, tables = self._layout.views(words)
        slots.fill_(self._scratch_block * self._block_size)
        context_lens.fill_(1)
        tables[:, 0] = self._scratch_block
        return words

    def _copy(self, words: Tensor) -> None:
        self._words.copy_(words, non_blocking=self._words.is_cuda)


def num_words(size: GraphSize, block_size: int) -> int:
    """Words of 32 bits that the operands of such a step take."""
    return _layout(size, block_size).num_words


def _layout(size: GraphSize, block_size: int) -> _Layout:
    return _Layout(size.num_seqs, -(-size.context_len // block_size))


def _aligned(num_words: int) -> int:
    return -(-num_words // _ALIGNMENT) * _ALIGNMENT
