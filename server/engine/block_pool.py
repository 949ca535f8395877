"""Which KV cache blocks are free, who owns the others, and which content can be read again. Knows no tensors."""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks 0 .. num_blocks - 1 of block_size tokens, each free or held by its owners.

    A block may carry the key of what it holds. It keeps key and content when its last owner leaves, until the room is
    needed: blocks without a key go first, the last freed before the others, then those least recently held.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))
        # free blocks that carry a key, the least recently held first
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_owners = [0] * num_blocks
        self._num_uses = [0] * num_blocks
        self._key_of_block: dict[int, bytes] = {}
        self._block_of_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """num_blocks blocks with one owner each and no key; None, and nothing taken, when there are fewer."""
        if num_blocks > self.num_free:
            return None
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._num_owners[block] = 1
            self._num_uses[block] += 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Take one owner from each block; a block without owners is free. The last ones will be reused first."""
        for block in reversed(blocks):
            assert self._num_owners[block] > 0, f"block {block} was released more often than allocated"
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                if block in self._key_of_block:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def take_cached(self, keys: Sequence[bytes]) -> list[int]:
        """One more owner for each block of the longest run of keys, from the first on, that is in the cache."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of_key.get(key)
            if block is None:
                break
            if self._num_owners[block] == 0:
                del self._cached[block]
            self._num_owners[block] += 1
            blocks.append(block)
        return blocks

    def name(self, block: int, key: bytes) -> None:
        """Let an owned block be found by the key of its content. The first block of a content keeps the key."""
        assert self._num_owners[block] > 0, f"block {block} is free"
        if key not in self._block_of_key and block not in self._key_of_block:
            self._block_of_key[key] = block
            self._key_of_block[block] = key

    def key_of(self, block: int) -> bytes | None:
        """What the block's content is found by, whoever owns it or nobody; None where it is not."""
        return self._key_of_block.get(block)

    def drop(self, key: bytes) -> None:
        """Find that content no more; where nobody owns its block, that is the next to be used."""
        block = self._block_of_key.pop(key)
        del self._key_of_block[block]
        if self._num_owners[block] == 0:
            del self._cached[block]
            self._blank.append(block)

    def num_uses_of(self, block: int) -> int:
        """How often it was allocated: while that stays, what was computed of it is in it."""
        return self._num_uses[block]

    def forget(self, blocks: Iterable[int]) -> None:
        """Take the keys from owned blocks: what they hold is not to be read by anybody else."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is free"
            key = self._key_of_block.pop(block, None)
            if key is not None:
                del self._block_of_key[key]

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that free, cached and owned blocks are all blocks, and each is counted as often as owners hold it."""
        held = Counter(block for blocks in owners for block in blocks)
        free = {*self._blank, *self._cached}
        assert len(free) == self.num_free, "a block is free twice"
        assert not free & held.keys(), f"blocks both free and owned: {sorted(free & held.keys())}"
        assert len(free) + len(held) == self.num_blocks, f"{self.num_blocks - len(free) - len(held)} blocks leaked"
        for block, num_owners in held.items():
            assert self._num_owners[block] == num_owners, f"block {block}: {self._num_owners[block]} != {num_owners}"
        assert self._block_of_key == {key: block for block, key in self._key_of_block.items()}, "a key has two blocks"
        assert free & self._key_of_block.keys() == self._cached.keys(), "a free block's key and its place disagree"

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        del self._block_of_key[self._key_of_block.pop(block)]
        return block
