"""How long the first token takes whose prompt has been seen before, in steps of decoding, on the demo model.

Of a prompt that comes again one token is left to compute, so its first token should take what any other does.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import CACHE, announce, positive_number, run_to_exit_code, writable_file
from benchmarks.demo_checkpoint import find_gguf, prepare_checkpoint
from benchmarks.errors import BenchmarkError
from benchmarks.machine import usable_cores
from benchmarks.measured_report import measure_and_print
from benchmarks.workload import TOKEN_IDS
from server.engine.assembly import assemble_engine
from server.engine.config import EngineConfig
from server.engine.request import EngineNews, GenerationRequest, SamplingParams
from server.model.loader import ignore_load_progress

# tokens seen before, and new ones after them
CASES = ((512, 0), (511, 0), (497, 0), (512, 1), (512, 8))
DECODED_TOKENS = 17


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds: a first token whose beginning is cached and one whose is not, in steps of decoding."""

    seen_tokens: int
    new_tokens: int
    cached_steps: float
    fresh_steps: float
    step_ms: float


@dataclass(frozen=True)
class Report:
    timings: tuple[Timing, ...]
    kernels: str

    def to_json(self) -> dict[str, object]:
        return {"kernels": self.kernels, "timings": [asdict(timing) for timing in self.timings]}

    def print_to(self, console: Console) -> None:
        table = Table(title=f"first token, in steps of decoding ({self.kernels})", title_justify="left")
        for column in ("seen tokens", "new tokens", "cached", "computed", "a step"):
            table.add_column(column, justify="right")
        for timing in self.timings:
            table.add_row(
                str(timing.seen_tokens),
                str(timing.new_tokens),
                f"{timing.cached_steps:.2f}",
                f"{timing.fresh_steps:.1f}",
                f"{timing.step_ms:.1f} ms",
            )
        console.print(table)


class _Engine:
    """Times single requests, one after the other."""

    def __init__(self, checkpoint: Path, num_threads: int, max_model_len: int) -> None:
        self._num_tokens: dict[str, int] = {}
        self._num_requests = 0
        config = EngineConfig(
            str(checkpoint), device="cpu", max_model_len=max_model_len, max_num_seqs=1, num_threads=num_threads
        )
        self._loop, self.model = assemble_engine(config, ignore_load_progress, self._count)

    def time(self, prompt: Sequence[int]) -> tuple[float, float]:
        """Seconds to the first token, and the median of a step of decoding after it."""
        self._num_requests += 1
        name = str(self._num_requests)
        sampling = SamplingParams(max_tokens=DECODED_TOKENS, temperature=0.0)
        start = time.perf_counter()
        self._loop.submit(GenerationRequest(name, tuple(prompt), sampling))
        while not self._num_tokens.get(name):
            self._loop.step()
        first = time.perf_counter() - start
        steps = []
        while self._loop.has_work:
            start = time.perf_counter()
            self._loop.step()
            steps.append(time.perf_counter() - start)
        if not steps:
            raise BenchmarkError("the model ended its answer with the first token: there is no step to compare with")
        return first, statistics.median(steps)

    def _count(self, news: EngineNews) -> None:
        for event in news.events:
            if event.error is not None:
                raise BenchmarkError(f"our engine failed a request: {event.error}")
            self._num_tokens[event.request_id] = self._num_tokens.get(event.request_id, 0) + len(event.token_ids)


def run(checkpoint: Path, cases: Sequence[tuple[int, int]], rounds: int, threads: int) -> Report:
    """cases: how many tokens are seen before, and how many new ones follow them. Raises BenchmarkError."""
    engine = _Engine(checkpoint, threads, max(sum(case) for case in cases) + DECODED_TOKENS)
    source = random.Random(0)
    timings = []
    for num_seen, num_new in cases:
        cached, fresh, steps = [], [], []
        for _ in range(rounds):
            seen = source.choices(TOKEN_IDS, k=num_seen)
            fresh_first, _ = engine.time(seen)
            cached_first, step = engine.time((*seen, *source.choices(TOKEN_IDS, k=num_new)))
            cached.append(cached_first / step)
            fresh.append(fresh_first / step)
            steps.append(1000 * step)
        timings.append(Timing(num_seen, num_new, *(statistics.median(values) for values in (cached, fresh, steps))))
    return Report(tuple(timings), engine.model.kernels)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cached_prefix", description=__doc__)
    parser.add_argument("--rounds", type=positive_number, default=9, help="default: %(default)s")
    parser.add_argument("--threads", type=positive_number, default=min(2, usable_cores()), help="default: %(default)s")
    parser.add_argument("--json", type=writable_file, metavar="PATH", help="keep every figure in this file")
    options = parser.parse_args(arguments)

    def measure() -> Report:
        checkpoint = prepare_checkpoint(find_gguf(), CACHE / "models", announce)
        return run(checkpoint, CASES, options.rounds, options.threads)

    return run_to_exit_code(lambda: measure_and_print(measure, options.json))


if __name__ == "__main__":
    sys.exit(main())
