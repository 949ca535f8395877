"""The block tables of all sequences that run, as rows of one array: a step copies its rows at once."""

import numpy as np
from numpy.typing import NDArray

_FIRST_WIDTH = 64


class BlockTables:
    """num_rows rows, each lent to one sequence while it runs; zero past the sequence's blocks."""

    def __init__(self, num_rows: int, block_size: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_rows, _FIRST_WIDTH), dtype=np.int32)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    def take_row(self, blocks: list[int]) -> int:
        """A row that holds these blocks."""
        row = self._free_rows.pop()
        self.write(row, 0, blocks)
        return row

    def give_back(self, row: int) -> None:
        self._tables[row] = 0
        self._free_rows.append(row)

    def write(self, row: int, start: int, blocks: list[int]) -> None:
        """Put blocks into a row from its start-th on."""
        stop = start + len(blocks)
        width = self._tables.shape[1]
        if stop > width:
            self._tables = np.pad(self._tables, ((0, 0), (0, max(stop, 2 * width) - width)))
        # one by one: mostly there is one, and a slice costs as much as ten
        for index, block in enumerate(blocks, start):
            self._tables[row, index] = block

    def gather(self, rows: list[int], max_context_len: int) -> NDArray[np.int32]:
        """A copy of rows, int32 [len(rows), blocks that hold max_context_len tokens]."""
        return self._tables[rows, : -(-max_context_len // self._block_size)]
