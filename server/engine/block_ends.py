"""What blocks hold that others may begin with, and not end with: who begins so copies one instead of computing it."""

import hashlib
from dataclasses import dataclass

from server.engine.block_pool import BlockPool
from server.engine.step_plan import TokenIds


@dataclass(frozen=True, eq=False)
class _BlockEnd:
    """A block, the key and the use of it when its content was noted, and the tokens that it holds: fewer than it has
    room for where the sequence ended in it.

    is_full: its key is that of a full block, which others find without this.
    """

    block: int
    key: bytes
    num_uses: int
    token_ids: TokenIds
    is_full: bool


class BlockEnds:
    """The blocks in which prompts and answers ended, by the key of all that stands before them.

    A block that is full is found whole by its key; one that is not, or of which only the beginning is wanted, here. Of
    several after one beginning the last is known, and the one before it makes room.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._ends: dict[bytes, _BlockEnd] = {}

    def note(self, before: bytes, block: int, token_ids: TokenIds) -> None:
        """An owned block holds these tokens, computed, after what the key `before` stands for."""
        key = self._pool.key_of(block)
        is_full = key is not None
        if key is None:
            # no content has it that is full
            key = hashlib.sha256(b"end of %d:%b%b" % (len(before), before, token_ids.tobytes())).digest()
        known = self._ends.get(before)
        if known is not None and known.key == key and self._holds(known):
            return
        if known is not None and not known.is_full and self._holds(known):
            self._pool.drop(known.key)
        if not is_full:
            self._pool.name(block, key)
        if len(self._ends) >= self._pool.num_blocks:
            self._ends = {own: end for own, end in self._ends.items() if self._holds(end)}
        # a copy: the sequence's text is far longer
        self._ends[before] = _BlockEnd(block, key, self._pool.num_uses_of(block), token_ids.copy(), is_full)

    def find(self, before: bytes, wanted: TokenIds) -> tuple[int, int] | None:
        """A block whose first tokens are the first of those wanted after that key, and how many; None without one."""
        end = self._ends.get(before)
        if end is None or not self._holds(end):
            return None
        num_tokens = min(len(end.token_ids), len(wanted))
        differs = end.token_ids[:num_tokens] != wanted[:num_tokens]
        num_common = int(differs.argmax()) if differs.any() else num_tokens
        return (end.block, num_common) if num_common else None

    def _holds(self, end: _BlockEnd) -> bool:
        """Whether the block still has the content that was noted."""
        # the same key in another use is of what the next step will compute, perhaps
        return self._pool.key_of(end.block) == end.key and self._pool.num_uses_of(end.block) == end.num_uses
