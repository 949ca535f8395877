"""How much memory this machine still has for the program. Linux only; elsewhere nobody knows."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
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
