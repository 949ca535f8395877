"""What every phase is handed, and what it is made of: items, each a piece of work that can fail alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu_phases.figures import Figure, Findings
from benchmarks.gpu_phases.sizes import Sizes
from benchmarks.gpu_phases.stopwatch import Call, Stopwatch, Timing

# no run is longer than this many calls: a graph of more takes long to make
MAX_CALLS = 192
# what is read once in so many times the L2 cache is not in it any more
CACHES_APART = 3
# where the device does not tell its own
TYPICAL_CACHE_BYTES = 64 * 2**20


class NotAvailableError(Exception):
    """Why an item has nothing to measure here: recorded as a skip, not as a failure."""


@dataclass(frozen=True)
class Item:
    """A piece of a phase: `run` yields its figures as they are measured."""

    name: str
    run: Callable[[], Iterable[Figure]]


@dataclass(frozen=True)
class Bench:
    """device: where tensors go; the interpreter's are on the CPU. findings: what phases have found so far."""

    device: torch.device
    sizes: Sizes
    stopwatch: Stopwatch
    findings: Findings

    @property
    def architecture(self) -> int:
        """Compute capability times ten; 0 for a CPU."""
        if self.device.type != "cuda":
            return 0
        major, minor = torch.cuda.get_device_capability(self.device)
        return 10 * major + minor

    @property
    def cache_bytes(self) -> int:
        """Of the L2 cache; nothing for a rehearsal, in which no cache is worth avoiding."""
        if self.device.type != "cuda":
            return 0
        return int(getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)) or TYPICAL_CACHE_BYTES

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(device=self.device).manual_seed(seed)

    def num_copies(self, num_bytes: int) -> int:
        """How many copies of so many bytes are read in turn, so that none is found in the cache."""
        return min(max(1, -(-CACHES_APART * self.cache_bytes // max(num_bytes, 1))), MAX_CALLS)

    def time(self, sides: Mapping[str, "Side"]) -> dict[str, Timing]:
        """Seconds a call of each side, measured in turn."""
        runs, lengths = {}, {}
        for name, side in sides.items():
            calls = self._repeat(side)
            runs[name], lengths[name] = self.stopwatch.prepare(calls), len(calls)
        seconds = self.stopwatch.compare(runs, self.sizes.num_rounds)
        return {name: Timing.of([value / lengths[name] for value in values]) for name, values in seconds.items()}

    def _repeat(self, side: "Side") -> list[Call]:
        """The calls in turn, as often as a run of run_seconds takes."""
        num_calls = min(round(self.sizes.run_seconds / side.expected_seconds), MAX_CALLS)
        num_repeats = max(1, -(-num_calls // len(side.calls)))
        return [*side.calls] * num_repeats


@dataclass(frozen=True)
class Side:
    """One of those that are compared: the same call on as many copies of the operands as the cache must not hold.

    expected_seconds: how long one takes about, at its best.
    """

    calls: Sequence[Call]
    expected_seconds: float
