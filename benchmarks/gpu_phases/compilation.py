"""Phase 0: compile every kernel variant on all cores at once; one after the other they would take minutes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

from benchmarks.gpu_phases.bench import Bench, Item, NotAvailableError
from benchmarks.gpu_phases.figures import Figure
from benchmarks.gpu_phases.launches import all_launches

PHASE = "compilation"
TABLE = "Compiling"
# each takes a context on the device, of half a gigabyte
MAX_PROCESSES = 12
# what is not compiled by then, later phases compile when they come to it
MAX_SECONDS = 70.0


def plan(bench: Bench) -> Sequence[Item]:
    return [Item("all variants on all cores", partial(_compile, bench))]


def _compile(bench: Bench) -> Iterator[Figure]:
    if bench.device.type != "cuda":
        raise NotAvailableError("the interpreter compiles nothing")
    num_processes = min(len(os.sched_getaffinity(0)), MAX_PROCESSES)
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_phases.launches", str(index), str(num_processes)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for index in range(num_processes)
    ]
    try:
        codes = [_wait(process, started + MAX_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    values = {
        "processes": num_processes,
        "launches": len(all_launches(bench)),
        "seconds": time.monotonic() - started,
        "late": sum(code is None for code in codes),
        "failed": sum(code not in (0, None) for code in codes),
    }
    yield Figure(TABLE, "all variants that are timed and checked", values)


def _wait(process: subprocess.Popen[bytes], until: float) -> int | None:
    """Its exit code; None where it is not done by then."""
    try:
        return process.wait(max(until - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        return None
