"""Decode and prefill speed of our engine beside llama.cpp: the same model, machine, threads and tokens, in one run."""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import llama_cpp_build
from benchmarks.command_line import (
    CACHE,
    announce,
    own_version,
    positive_number,
    run_to_exit_code,
    writable_file,
)
from benchmarks.comparison import Comparison, render_table
from benchmarks.demo_checkpoint import find_gguf, prepare_checkpoint, prepare_q4_0, size_of
from benchmarks.llama_cpp_build import LlamaCppBuild, cmake_options
from benchmarks.llama_cpp_peer import LlamaCppPeer
from benchmarks.machine import CPUINFO, Cpu, measure_busy_cores, parse_cpuinfo, usable_cores
from benchmarks.measured_report import measure_and_print
from benchmarks.own_engine import OwnEngine
from benchmarks.own_server import OwnServer
from benchmarks.workload import WORKLOADS, Side, Workload

DEFAULT_ROUNDS = 5
# our speed over the peer's, by the names under which the JSON has the medians
HEADLINES = {
    "prefill_ratio": Workload(prompt_tokens=512),
    "decode_ratio": Workload(prompt_tokens=128, decode_tokens=64),
    "concurrent8_ratio": Workload(prompt_tokens=128, decode_tokens=64, num_sequences=8, over_http=True),
}
CAVEAT = (
    "Medians and (lowest..highest) of the rounds; above a ratio of 1, awq-serve is faster. How fast the memory is, "
    "which decides about decoding, is not measured: compare ratios, and tokens per second only within a run."
)
FIRST_RUN = "The first run builds llama.cpp and quantizes the model, which takes about ten minutes on two cores."
EXAMPLES = """examples:
  python -m benchmarks.cpu                         the table
  python -m benchmarks.cpu --json figures.json     the table, and every figure in a file
  python -m benchmarks.cpu --rounds 15             a longer run, for a busy machine
"""


@dataclass(frozen=True)
class Options:
    rounds: int
    threads: int
    json_path: Path | None


@dataclass(frozen=True)
class Report:
    """The figures and what a reader must know of them. busy_cores: what other programs used, before and after."""

    cpu: Cpu
    options: Options
    llama_cpp_system: str
    our_dtype: str
    model_bytes: Mapping[str, int]
    busy_cores: tuple[float, float]
    comparisons: tuple[Comparison, ...]

    def versions(self) -> dict[str, str]:
        return {
            "awq-serve": own_version(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "llama-cpp-python": llama_cpp_build.VERSION,
        }

    def to_json(self) -> dict[str, object]:
        return {
            "command": f"python -m benchmarks.cpu --rounds {self.options.rounds} --threads {self.options.threads}",
            "cpu": {"name": self.cpu.name, "flags": self.cpu.relevant_flags, "usable_cores": usable_cores()},
            "threads": self.options.threads,
            "rounds": self.options.rounds,
            "versions": self.versions(),
            "llama_cpp_system": self.llama_cpp_system,
            "llama_cpp_cmake": cmake_options(self.cpu.flags),
            "awq_serve_dtype": self.our_dtype,
            "model_bytes": dict(self.model_bytes),
            "busy_cores_before_and_after": self.busy_cores,
            **{key: self._median_ratio(workload) for key, workload in HEADLINES.items()},
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }

    def _median_ratio(self, workload: Workload) -> float:
        return next(comparison.ratio.median for comparison in self.comparisons if comparison.workload == workload)

    def print_to(self, console: Console) -> None:
        console.print(render_table(self.comparisons, title="SmolLM2-135M-Instruct, awq-serve beside llama.cpp"))
        others = "other programs used {:.1f} cores before it and {:.1f} after".format(*self.busy_cores)
        sizes = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in self.model_bytes.items())
        for line in (
            f"CPU: {self.cpu.name}; {' '.join(self.cpu.relevant_flags)}; {usable_cores()} usable cores",
            f"Run: {self.options.threads} threads a side, {self.options.rounds} rounds; {others}",
            f"Versions: {', '.join(f'{name} {number}' for name, number in self.versions().items())}",
            f"Models: {sizes}; ours computes in {self.our_dtype}",
            f"llama.cpp: {self.llama_cpp_system}",
            CAVEAT,
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    return run_to_exit_code(lambda: measure_and_print(lambda: run(options), options.json_path))


def parse_options(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=f"{__doc__}\n{FIRST_RUN}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive_number, default=DEFAULT_ROUNDS, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=positive_number, default=min(2, usable_cores()), help="of each side; default: %(default)s"
    )
    parser.add_argument("--json", type=writable_file, metavar="PATH", help="keep every figure in this file")
    parsed = parser.parse_args(arguments)
    return Options(parsed.rounds, parsed.threads, parsed.json)


def run(options: Options) -> Report:
    """Prepare both sides, measure them, and say what they are. Raises BenchmarkError."""
    cpu = parse_cpuinfo(CPUINFO.read_text())
    gguf = find_gguf()
    build = LlamaCppBuild(CACHE / "llama-cpp", cmake_options(cpu.flags))
    if not build.environment.is_ready:
        build.make(announce)
    checkpoint = prepare_checkpoint(gguf, CACHE / "models", announce)
    q4_0 = prepare_q4_0(build.environment.python, gguf, CACHE / "models", announce)
    announce("loading both sides")
    own = OwnEngine(checkpoint, options.threads)
    with (
        LlamaCppPeer(build.environment.python, q4_0, options.threads) as peer,
        OwnServer(checkpoint, options.threads) as server,
    ):
        busy_before = measure_busy_cores()
        comparisons = compare(lambda workload: server if workload.over_http else own, peer, options.rounds, announce)
        busy_after = measure_busy_cores()
        return Report(
            cpu=cpu,
            options=options,
            llama_cpp_system=peer.system,
            our_dtype=own.model.dtype,
            model_bytes={"AWQ checkpoint": size_of(checkpoint), "GGUF Q4_0": size_of(q4_0)},
            busy_cores=(busy_before, busy_after),
            comparisons=comparisons,
        )


def compare(
    own_side: Callable[[Workload], Side], peer: Side, rounds: int, say: Callable[[str], None]
) -> tuple[Comparison, ...]:
    """Run both sides in turn, never together: each workload once untimed, then once a round."""
    say("warming both sides")
    for workload in WORKLOADS:
        for side in (own_side(workload), peer):
            side.run(workload.draw("warm-up"))
    seconds: dict[Workload, list[tuple[float, float]]] = {workload: [] for workload in WORKLOADS}
    start = time.monotonic()
    for index in range(rounds):
        left = f", {(time.monotonic() - start) / index * (rounds - index):.0f} s left" if index else ""
        say(f"round {index + 1} of {rounds}{left}")
        for workload in WORKLOADS:
            trial = workload.draw(f"round {index}")
            seconds[workload].append((own_side(workload).run(trial), peer.run(trial)))
    return tuple(
        Comparison(workload, tuple(ours for ours, _ in pairs), tuple(theirs for _, theirs in pairs))
        for workload, pairs in seconds.items()
    )


if __name__ == "__main__":
    sys.exit(main())
