"""One benchmark at a time: two would build the peer in the same place and spoil each other's figures."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def take_turn(directory: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold the directory's lock, after waiting for it if need be. The system frees it when this process ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce("another benchmark is running here; waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
