"""A hidden folder belongs to one living process at a time."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quant.checkpoint.work_folder import WorkFolder

NUM_THREADS, NUM_ROUNDS = 6, 400


def accept_all(_folder: Path) -> bool:
    return True


def accept_none(_folder: Path) -> bool:
    return False


def claim_and_use(out: Path) -> int:
    """How often a folder was still there, with what was put into it, after others had started."""
    num_intact = 0
    for _ in range(NUM_ROUNDS):
        folder = WorkFolder.claim(out, accept_none)
        (folder.path / "file").write_text("")
        WorkFolder.claim(out, accept_none).remove()
        num_intact += (folder.path / "file").exists()
        folder.remove()
    return num_intact


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
def test_runs_that_start_at_the_same_time_never_take_each_others_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        intact = list(pool.map(claim_and_use, [tmp_path / "out"] * NUM_THREADS))

    assert intact == [NUM_ROUNDS] * NUM_THREADS
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_let_go_of_is_claimed_again_with_what_is_in_it(tmp_path: Path) -> None:
    first = WorkFolder.claim(tmp_path / "out", accept_none)
    (first.path / "file").write_text("content")
    first.release()

    second = WorkFolder.claim(tmp_path / "out", accept_all)

    assert second.path == first.path
    assert (second.path / "file").read_text() == "content"
    assert second.num_bytes() == len("content")
    second.remove()


def test_a_folder_that_is_held_is_not_even_offered(tmp_path: Path) -> None:
    first = WorkFolder.claim(tmp_path / "out", accept_none)

    second = WorkFolder.claim(tmp_path / "out", accept_all)

    assert second.path != first.path
    assert first.path.is_dir()
    first.remove()
    second.remove()


def test_of_several_folders_one_is_claimed_and_the_others_are_removed(tmp_path: Path) -> None:
    folders = [WorkFolder.claim(tmp_path / "out", accept_none) for _ in range(3)]
    for folder in folders:
        folder.release()

    claimed = WorkFolder.claim(tmp_path / "out", accept_all)

    assert list(tmp_path.iterdir()) == [claimed.path]
    claimed.remove()


def test_only_the_parents_that_were_made_are_removed_and_only_while_they_are_empty(tmp_path: Path) -> None:
    # given a place whose parents are there in part, and a file that somebody puts into one of the new ones
    (tmp_path / "old").mkdir()
    folder = WorkFolder.claim(tmp_path / "old" / "new" / "newer" / "out", accept_none)
    (tmp_path / "old" / "new" / "foreign").write_text("")

    folder.remove()

    assert list((tmp_path / "old" / "new").iterdir()) == [tmp_path / "old" / "new" / "foreign"]
