"""Times short calls on the device. The only file that knows of CUDA events; a CPU has a clock instead."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.engine.graph_recorder import CudaGraphRecorder, Replay

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the rounds, and the tenth and the ninetieth percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), deciles[0], deciles[8])


class Run(Protocol):
    """Calls that were prepared to be run together, one after the other."""

    def start(self) -> None:
        """Run them all once; on a GPU, without waiting for the end."""
        ...


class Stopwatch(Protocol):
    def prepare(self, calls: Sequence[Call]) -> Run:
        """Run each call once untimed, which compiles what is to be compiled, and make one run of them all."""
        ...

    def compare(self, runs: Mapping[str, Run], num_rounds: int) -> dict[str, list[float]]:
        """Run all in turn, round after round: what slows the machine for a while slows all. Seconds a run, by name."""
        ...

    def wait(self) -> None:
        """Until the device has done all; raises what went wrong there."""
        ...


@dataclass(frozen=True)
class ClockRun:
    calls: tuple[Call, ...]

    def start(self) -> None:
        for call in self.calls:
            call()


class ClockStopwatch:
    """For a CPU: calls are over when they return."""

    def prepare(self, calls: Sequence[Call]) -> ClockRun:
        calls[0]()
        return ClockRun(tuple(calls))

    def compare(self, runs: Mapping[str, Run], num_rounds: int) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(num_rounds):
            for name, run in runs.items():
                started = time.perf_counter()
                run.start()
                seconds[name].append(time.perf_counter() - started)
        return seconds

    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True)
class GraphRun:
    """calls: what is replayed; they hold the tensors that it reads and writes."""

    replay: Replay
    calls: tuple[Call, ...]

    def start(self) -> None:
        self.replay()


class CudaStopwatch:
    """For a GPU: a run is one CUDA graph, so that no time of the host's is measured, between two events."""

    def prepare(self, calls: Sequence[Call]) -> GraphRun:
        for call in dict.fromkeys(calls):
            call()

        def run() -> None:
            # results are dropped at once, so the next call writes where this one did
            for call in calls:
                call()

        # a pool of its own: what runs leave behind is read by nobody, but a run may be let go before others
        return GraphRun(CudaGraphRecorder().record(run), tuple(calls))

    def compare(self, runs: Mapping[str, Run], num_rounds: int) -> dict[str, list[float]]:
        names = [name for _ in range(num_rounds) for name in runs]
        starts, stops = ([_event() for _ in names] for _ in range(2))
        torch.cuda.synchronize()
        # untimed: it warms the caches, and keeps the device busy until the host has queued what is timed
        for run in runs.values():
            run.start()
        for name, start, stop in zip(names, starts, stops, strict=True):
            start.record()
            runs[name].start()
            stop.record()
        torch.cuda.synchronize()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for name, start, stop in zip(names, starts, stops, strict=True):
            seconds[name].append(start.elapsed_time(stop) / 1000)
        return seconds

    def wait(self) -> None:
        torch.cuda.synchronize()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def make_stopwatch(device: torch.device) -> Stopwatch:
    return CudaStopwatch() if device.type == "cuda" else ClockStopwatch()
