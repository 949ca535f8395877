"""How often a call is repeated and on how many copies, and what is told of the times."""

from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.gpu_phases.bench import MAX_CALLS, Bench, Side
from benchmarks.gpu_phases.stopwatch import Call, ClockStopwatch, Run, Timing

MIB = 2**20


@dataclass(frozen=True)
class GpuBench(Bench):
    """As on a GPU with 50 MiB of L2."""

    @property
    def cache_bytes(self) -> int:
        return 50 * MIB


class CountingStopwatch(ClockStopwatch):
    """Says that every run takes ten seconds, and keeps the runs."""

    def __init__(self) -> None:
        self.runs: list[list[Call]] = []

    def prepare(self, calls: list[Call]) -> Run:  # type: ignore[override]
        self.runs.append(list(calls))
        return super().prepare(calls)

    def compare(self, runs: dict[str, Run], num_rounds: int) -> dict[str, list[float]]:  # type: ignore[override]
        return {name: [10.0] * num_rounds for name in runs}


@pytest.mark.parametrize(
    ("num_bytes", "num_copies"),
    [
        # together three times the cache, so that a copy is out of it when its turn comes again
        (50 * MIB, 3),
        (9 * MIB, 17),
        (500 * MIB, 1),
        # a graph of more calls takes long to make
        (1, MAX_CALLS),
    ],
)
def test_copies_are_three_times_the_cache(bench: Bench, num_bytes: int, num_copies: int) -> None:
    gpu = GpuBench(bench.device, bench.sizes, bench.stopwatch, bench.findings)

    assert gpu.num_copies(num_bytes) == num_copies
    assert bench.num_copies(num_bytes) == 1


def test_a_run_goes_through_all_copies_in_turn_and_lasts_long_enough(bench: Bench) -> None:
    stopwatch = CountingStopwatch()
    long = replace(bench, stopwatch=stopwatch, sizes=replace(bench.sizes, run_seconds=1e-3))
    calls = [lambda index=index: index for index in range(3)]

    timings = long.time({"ours": Side(calls, expected_seconds=1e-4), "theirs": Side(calls[:1], expected_seconds=1.0)})

    ours, theirs = stopwatch.runs
    assert [call() for call in ours] == [0, 1, 2] * 4
    assert len(theirs) == 1
    # seconds of a call, not of the run
    assert timings["ours"].median == pytest.approx(10 / 12)
    assert timings["theirs"].median == 10


def test_the_spread_is_the_middle_eight_tenths() -> None:
    timing = Timing.of([float(value) for value in range(11)])

    assert (timing.p10, timing.median, timing.p90) == (1.0, 5.0, 9.0)
    assert Timing.of([2.0]) == Timing(2.0, 2.0, 2.0)


def test_sides_take_turns(bench: Bench) -> None:
    order: list[str] = []
    stopwatch = ClockStopwatch()
    runs = {name: stopwatch.prepare([lambda name=name: order.append(name)]) for name in ("ours", "theirs")}
    order.clear()

    seconds = stopwatch.compare(runs, 3)

    assert order == ["ours", "theirs"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"ours": 3, "theirs": 3}


def test_a_cpu_has_no_architecture_and_no_cache_to_avoid(bench: Bench) -> None:
    assert (bench.architecture, bench.cache_bytes) == (0, 0)
    assert torch.equal(torch.rand(3, generator=bench.generator(1)), torch.rand(3, generator=bench.generator(1)))
