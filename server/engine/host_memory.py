"""How much memory this process may still take: what the machine has free, within the container's limit."""

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Linux's MemAvailable, or what the control group leaves of its limit when that is less."""
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit_file, usage_file = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit_file.is_file() and usage_file.is_file() and (limit := limit_file.read_text().strip()) != "max":
        available = min(available, int(limit) - int(usage_file.read_text()))
    return max(available, 0)
