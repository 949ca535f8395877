"""Which KV cache blocks are free and how many owners the others have. Knows neither tensors nor requests' tokens."""

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 .. num_blocks - 1 of block_size tokens, each free or held by its owners. The last freed goes first."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """num_blocks blocks with one owner each; None, and nothing taken, when there are fewer."""
        if num_blocks > len(self._free):
            return None
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block; a block without owners is free."""
        for block in reversed(blocks):
            assert self._num_owners[block] > 0, f"block {block} was released more often than allocated"
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                self._free.append(block)

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that free and owned blocks are all blocks, and that each is counted as often as the owners hold it."""
        held = Counter(block for blocks in owners for block in blocks)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert not free & held.keys(), f"blocks both free and owned: {sorted(free & held.keys())}"
        assert len(free) + len(held) == self.num_blocks, f"{self.num_blocks - len(free) - len(held)} blocks leaked"
        for block, num_owners in held.items():
            assert self._num_owners[block] == num_owners, f"block {block}: {self._num_owners[block]} != {num_owners}"
