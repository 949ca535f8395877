"""Rows of one array: each sequence's blocks, zero behind them, and room that grows."""

import numpy as np

from server.engine.block_tables import BlockTables


def test_a_step_gets_its_rows_as_wide_as_its_longest_context() -> None:
    tables = BlockTables(num_rows=4, block_size=16)
    first, second = tables.take_row([7, 8, 9]), tables.take_row([3])
    tables.write(second, 1, [4, 5])
    gathered = tables.gather([second, first], max_context_len=33)
    assert gathered.tolist() == [[3, 4, 5], [7, 8, 9]]
    assert gathered.dtype == np.int32
    assert gathered.flags.c_contiguous
    assert tables.gather([first], max_context_len=32).tolist() == [[7, 8]]


def test_what_was_gathered_does_not_change_later() -> None:
    tables = BlockTables(num_rows=1, block_size=1)
    row = tables.take_row([1])
    gathered = tables.gather([row], max_context_len=2)
    tables.write(row, 1, [2])
    assert gathered.tolist() == [[1, 0]]


def test_a_row_is_zero_behind_its_blocks_whoever_had_it_before() -> None:
    tables = BlockTables(num_rows=1, block_size=4)
    tables.give_back(tables.take_row([5, 6, 7]))
    row = tables.take_row([9])
    assert tables.gather([row], max_context_len=12).tolist() == [[9, 0, 0]]


def test_rows_grow_and_keep_what_they_hold() -> None:
    tables = BlockTables(num_rows=2, block_size=1)
    row, other = tables.take_row([1]), tables.take_row([2])
    tables.write(row, 1, list(range(1000)))
    assert tables.gather([row], max_context_len=1001).tolist() == [[1, *range(1000)]]
    assert tables.gather([other], max_context_len=2).tolist() == [[2, 0]]
