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


def keep_and_release(pool: BlockPool, keys: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        pool.name(block, key)
    pool.release(blocks)
    return blocks


def test_content_outlives_its_owner_and_is_found_by_its_keys() -> None:
    pool = BlockPool(4, 16)
    blocks = keep_and_release(pool, [b"a", b"b"])
    assert pool.num_free == 4
    # when somebody asks for the same beginning and something else after it
    found = pool.take_cached([b"a", b"b", b"c"])
    # then the blocks are theirs
    assert found == blocks
    assert pool.num_free == 2
    pool.check_integrity([found])


def test_a_gap_ends_what_is_found() -> None:
    pool = BlockPool(4, 16)
    keep_and_release(pool, [b"a", b"b"])
    assert pool.take_cached([b"x", b"a"]) == []


def test_a_shared_block_is_free_when_its_last_owner_leaves() -> None:
    pool = BlockPool(2, 16)
    keep_and_release(pool, [b"a"])
    first, second = pool.take_cached([b"a"]), pool.take_cached([b"a"])
    assert first == second
    pool.check_integrity([first, second])
    pool.release(first)
    assert pool.num_free == 1
    pool.release(second)
    assert pool.num_free == 2


def test_the_content_that_was_held_last_is_dropped_last_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, 16)
    keep_and_release(pool, [b"old 1", b"old 2"])
    keep_and_release(pool, [b"new 1", b"new 2"])
    # when there is room for three others only
    assert pool.allocate(3) is not None
    # then the beginning of the newer content is what is left
    assert len(pool.take_cached([b"new 1"])) == 1
    assert pool.take_cached([b"old 1"]) == []


def test_blocks_without_content_are_handed_out_first() -> None:
    pool = BlockPool(4, 16)
    blocks = keep_and_release(pool, [b"a", b"b"])
    others = pool.allocate(2)
    assert others is not None
    assert not {*others} & {*blocks}
    assert pool.take_cached([b"a", b"b"]) == blocks


def test_equal_content_in_two_blocks_is_found_in_the_first() -> None:
    pool = BlockPool(4, 16)
    twice = pool.allocate(2)
    assert twice is not None
    for block in twice:
        pool.name(block, b"a")
    assert pool.take_cached([b"a"]) == [twice[0]]
    pool.check_integrity([twice, twice[:1]])


def test_forgotten_content_is_found_by_nobody() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.name(blocks[0], b"a")
    pool.forget(blocks)
    assert pool.take_cached([b"a"]) == []
    pool.release(blocks)
    pool.check_integrity([])
