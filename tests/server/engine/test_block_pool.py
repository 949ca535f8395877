import pytest

from server.engine.block_pool import BlockPool


def test_blocks_are_handed_out_once() -> None:
    pool = BlockPool(5, 16)
    first, second = pool.allocate(2), pool.allocate(3)
    assert first is not None
    assert second is not None
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    pool.check_integrity([first, second])


def test_too_few_blocks_give_none_and_take_nothing() -> None:
    pool = BlockPool(3, 16)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_what_is_released_can_be_allocated_again() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.allocate(3) is not None


def test_a_second_release_is_a_defect() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


def test_integrity_names_a_leak_and_a_double_use() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    assert blocks is not None
    with pytest.raises(AssertionError, match="2 blocks leaked"):
        pool.check_integrity([])
    with pytest.raises(AssertionError, match="1 != 2"):
        pool.check_integrity([blocks, blocks])
