"""What the figures depend on and what a reader must know of the machine: its CPU, and who else uses it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# the flags that decide which kernels either side can use
RELEVANT_FLAGS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)


@dataclass(frozen=True)
class Cpu:
    """flags: all that the kernel lists."""

    name: str
    flags: frozenset[str]

    @property
    def relevant_flags(self) -> tuple[str, ...]:
        return tuple(flag for flag in RELEVANT_FLAGS if flag in self.flags)


def parse_cpuinfo(text: str) -> Cpu:
    """The first processor of /proc/cpuinfo; the others are like it."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", "unknown")
    numbers = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return Cpu(f"{name} ({numbers})", frozenset(fields.get("flags", "").split()))


def usable_cores() -> int:
    """The cores this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def measure_busy_cores(seconds: float = 1.0) -> float:
    """How many cores are at work while this process waits: what other programs take away from the figures."""
    busy_before = _busy_ticks()
    time.sleep(seconds)
    return (_busy_ticks() - busy_before) / os.sysconf("SC_CLK_TCK") / seconds


def _busy_ticks() -> int:
    # user, nice, system, idle, iowait, irq, softirq, steal: all but the two in which a core stands still
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4]
