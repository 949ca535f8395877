"""How much memory this machine still has for the program, and giving some back. Linux only; elsewhere nobody knows."""

import ctypes
import sys
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
# less of it is held for the next matrices: to give it back and take it again costs a tenth of a small model's time
WORTH_GIVING_BACK = 2**28
# what a container may take, and has taken
CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP) -> int | None:
    """What can be allocated without swapping, within the limit of the container; None where it cannot be read."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, LookupError, ValueError):
        return None
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        # no container, or one without a limit, whose file says "max"
        return free_bytes
    return min(free_bytes, max(0, limit - used))


def give_back_freed(num_bytes: int) -> None:
    """Give the system what the allocator holds of freed memory: after matrices of many sizes, as much as a block.

    num_bytes: of what was worked on. Where that is small so is what is held, and it is taken again at once.
    By glibc's malloc_trim; nothing happens where that is not the allocator.
    """
    if num_bytes < WORTH_GIVING_BACK:
        return
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
