"""The hidden folder beside an output where a run works: made, locked while the run lives, kept or removed at its end.

One process holds a folder at a time; the lock goes when its process does, however that ends. It knows no file in it.
"""

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


class WorkFolder:
    """A folder that this process holds. path: where it is. Use `claim` to get one, and `release` when done."""

    def __init__(self, path: Path, lock: int, new_parents: tuple[Path, ...]) -> None:
        self.path = path
        self._lock = lock
        self._new_parents = new_parents

    @classmethod
    def claim(cls, out: Path, accepts: Callable[[Path], bool]) -> "WorkFolder":
        """The folder that a dead run left for `out` and that `accepts` takes, else a new one.

        Others that dead runs left for the same `out` are removed; those of living runs stay. Raises OSError.
        """
        new_parents = make_parents(out)
        accepted = None
        for path in folders_for(out):
            lock = _try_lock(path) if path.is_dir() else None
            if lock is None:
                continue
            if accepted is None and accepts(path):
                accepted = cls(path, lock, new_parents)
            else:
                shutil.rmtree(path)
                os.close(lock)
        if accepted is not None:
            return accepted
        while True:
            path = Path(tempfile.mkdtemp(prefix=_prefix(out), dir=out.parent))
            lock = _try_lock(path)
            # another run may have taken it for a dead one's before it was locked, and removed it
            if lock is not None:
                return cls(path, lock, new_parents)

    def num_bytes(self) -> int:
        """What its files take on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def release(self) -> None:
        """Let go of the folder, and leave it as it is for a later run."""
        os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder, and the folders above it that were made for it and hold nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        remove_empty(self._new_parents)


def make_parents(out: Path) -> tuple[Path, ...]:
    """Make the folders above `out`; returns those that were not there, the innermost first. Raises OSError."""
    new_parents = tuple(folder for folder in out.parents if not folder.exists())
    out.parent.mkdir(parents=True, exist_ok=True)
    return new_parents


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the innermost first, up to one that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def folders_for(out: Path) -> list[Path]:
    """The hidden folders that runs made for `out` and that are there now, by name."""
    return sorted(out.parent.glob(f"{glob.escape(_prefix(out))}*"))


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, would survive a loss of power. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the folder; None when another process does, or has removed it meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
