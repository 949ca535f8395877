"""A bench that measures nothing but the clock, with the sizes of a rehearsal."""

import pytest
import torch

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.figures import Findings
from benchmarks.gpu_phases.sizes import REHEARSAL
from benchmarks.gpu_phases.stopwatch import ClockStopwatch


@pytest.fixture
def bench() -> Bench:
    return Bench(torch.device("cpu"), REHEARSAL, ClockStopwatch(), Findings())
