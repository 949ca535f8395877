"""Who runs the jobs of a job file: at most one process at a time, by a lock that the kernel drops with its holder."""

import fcntl
import os
from pathlib import Path

from server.errors import JobStoreUnavailable


class RunnerLock:
    """An exclusive lock on `<job file>.lock`. It holds nothing in the file, so a stale file is no stale lock."""

    def __init__(self, job_file: Path) -> None:
        self._path = job_file.with_name(f"{job_file.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> bool:
        """True when this object holds the lock. Raises JobStoreUnavailable when the lock file cannot be made."""
        if self._descriptor is not None:
            return True
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise JobStoreUnavailable(f"the lock file {self._path} cannot be made: {error}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
