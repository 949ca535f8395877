"""Which blocks a sequence holds, and who else may read them. Knows neither tensors nor queues."""

import math

from server.engine.block_ends import BlockEnds
from server.engine.block_pool import BlockPool
from server.engine.block_tables import BlockTables
from server.engine.sequence import Sequence


class CacheManager:
    """Gives blocks of a pool to sequences, takes them back, and lets others find what they hold."""

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        *,
        prefix_caching: bool,
        shared_chunk: int | None,
        copies_blocks: bool = False,
    ) -> None:
        """shared_chunk: of a prompt, whole chunks of so many tokens are shared and nothing else; None: any full block.

        max_num_seqs: sequences that are in the tables at once. copies_blocks: blocks of which a sequence needs a part
        are copied for it.
        """
        assert shared_chunk is None or not copies_blocks, "what is copied was not computed in chunks of its own"
        self.tables = BlockTables(max_num_seqs, pool.block_size)
        self.block_size = pool.block_size
        self._pool = pool
        self._prefix_caching = prefix_caching
        self._shared_chunk = shared_chunk
        self._ends = BlockEnds(pool) if copies_blocks and prefix_caching else None

    def take_cached(self, sequence: Sequence) -> None:
        """Give a sequence without blocks those that hold the beginning of what it knows; one token is left to do."""
        # scores of a prompt need all of it computed
        if not self._prefix_caching or sequence.request.sampling.prompt_logprobs is not None:
            return
        num_wanted = sequence.num_known - 1
        unit = self.block_size
        if self._shared_chunk is not None:
            num_wanted = min(num_wanted, sequence.num_prompt)
            unit = math.lcm(unit, self._shared_chunk)
        found = self._pool.take_cached(sequence.block_keys(num_wanted - num_wanted % unit))
        num_cached = len(found) * self.block_size // unit * unit
        num_blocks = num_cached // self.block_size
        self._pool.release(found[num_blocks:])
        sequence.add_blocks(found[:num_blocks])
        sequence.num_computed = sequence.num_shareable = num_cached
        if self._ends is not None:
            wanted = sequence.text[num_cached : sequence.num_known - 1]
            found_end = self._ends.find(sequence.key_before(num_blocks), wanted)
            if found_end is not None:
                block, num_copied = found_end
                sequence.copied_block = (block, num_blocks)
                sequence.num_computed += num_copied

    def offer(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the blocks that are full when this step has computed so many tokens of the sequence.

        Whoever reads them runs later, or in the same step and after it, where every layer writes before it reads.
        """
        if not self._prefix_caching:
            return
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        if self._shared_chunk is not None and (
            start != sequence.num_shareable or num_tokens != self._shared_chunk or end > sequence.num_prompt
        ):
            return
        first, last = sequence.num_shareable // self.block_size, end // self.block_size
        sequence.num_shareable = end
        if first < last:
            keys = sequence.block_keys(end)
            for index in range(first, last):
                self._pool.name(sequence.blocks[index], keys[index])

    def note_ends(self, sequence: Sequence) -> None:
        """Let others copy the blocks in which its prompt and what is computed of it end, before it is released."""
        num_computed = min(sequence.num_computed, sequence.num_known)
        if self._ends is None or not sequence.others_may_read:
            return
        for end in {min(sequence.num_prompt, num_computed), num_computed} - {0}:
            index = (end - 1) // self.block_size
            tokens = sequence.text[index * self.block_size : min((index + 1) * self.block_size, num_computed)]
            self._ends.note(sequence.key_before(index), sequence.blocks[index], tokens)

    def take_copy(self, sequence: Sequence) -> tuple[int, int] | None:
        """The block to copy for a sequence that was just given its blocks, and its own; None without one."""
        if sequence.copied_block is None:
            return None
        (source, index), sequence.copied_block = sequence.copied_block, None
        return source, sequence.blocks[index]

    def allocate_missing(self, sequence: Sequence) -> bool:
        """Blocks for all that the sequence knows and guesses; False, and nothing given, when too few are free."""
        if sequence.num_missing_blocks == 0:
            return True
        blocks = self._pool.allocate(sequence.num_missing_blocks)
        if blocks is not None:
            sequence.add_blocks(blocks)
        return blocks is not None

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence that is in no table."""
        sequence.copied_block = None
        self._pool.release(sequence.take_blocks())

    def forget_uncomputed(self, sequence: Sequence) -> None:
        """Others might find in its blocks what a step that failed was to put there."""
        self._pool.forget(sequence.blocks[sequence.num_computed // self.block_size :])
        sequence.num_shareable = min(sequence.num_shareable, sequence.num_computed)

    def forget(self, sequence: Sequence) -> None:
        """Nobody else is to read what a sequence holds."""
        sequence.others_may_read = False
        self._pool.forget(sequence.blocks)
