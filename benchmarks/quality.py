"""Quality of our quantizer's checkpoints beside llm-compressor's and AutoRound's: one model, one machine, one run.

4 bits in groups of 64, asymmetric, the linears of the blocks only. Each tool runs alone, in an environment of its own,
with a number of calibration tokens of its own. The same code measures what all of them wrote.
"""

import argparse
import json
import platform
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from benchmarks.command_line import CACHE, announce, own_version, positive_number, run_to_exit_code, writable_file
from benchmarks.demo_checkpoint import find_gguf, prepare_dense
from benchmarks.errors import BenchmarkError
from benchmarks.machine import CPUINFO, Cpu, measure_busy_cores, parse_cpuinfo, usable_cores
from benchmarks.measured_report import measure_and_print
from benchmarks.quality_job import Job
from benchmarks.quality_report import (
    ORIGINAL,
    PLAIN_ROUNDING,
    Outcome,
    TextResult,
    measure_bits_per_weight,
    render_table,
)
from benchmarks.quality_tools import AUTO_ROUND, LLM_COMPRESSOR, PEERS, Peer, Tool, make_environment, run_tool
from quant.dense_checkpoint import load_dense
from quant.errors import QuantError
from quant.evaluate import HELD_OUT_TEXT, TextWindows, compare, cut_windows
from quant.method import Method
from quant.progress import ProgressListener, ProgressMeter
from quant.report import REPORT_FILE
from quant.source import open_source

WINDOW_TOKENS = 512
NONE = "none"
Choice = TypeVar("Choice")
CAVEAT = (
    "Way back: the share of what plain rounding costs in perplexity that a tool gives back. Seconds: from the model's "
    "files to the checkpoint's, in a process of its own; starting it is not counted. Bits: a quantized weight in the "
    "checkpoint's files. GB: the most memory that the process held."
)
EXAMPLES = """examples:
  python -m benchmarks.quality --calib train.txt --text test.txt      all tools, one table
  python -m benchmarks.quality --calib train.txt --text test.txt --text code.txt --json figures.json
  python -m benchmarks.quality --calib train.txt --ours awq --peers llm-compressor --llm-compressor-samples 1
"""


@dataclass(frozen=True)
class Options:
    calibration: Path
    texts: tuple[Path, ...]
    tools: tuple[Tool, ...]
    num_windows: int
    threads: int
    json_path: Path | None

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(tool.peer for tool in self.tools if tool.peer)


@dataclass(frozen=True)
class Report:
    """The figures and what a reader must know of them. busy_cores: what other programs used, before and after."""

    cpu: Cpu
    options: Options
    busy_cores: tuple[float, float]
    outcomes: tuple[Outcome, ...]
    results: tuple[TextResult, ...]

    def to_json(self) -> dict[str, object]:
        return {
            "cpu": {"name": self.cpu.name, "flags": self.cpu.relevant_flags, "usable_cores": usable_cores()},
            "threads": self.options.threads,
            "versions": {"awq-serve": own_version(), "python": platform.python_version()},
            "calibration_text": self.options.calibration.name,
            "busy_cores_before_and_after": self.busy_cores,
            "tools": [outcome.to_json() for outcome in self.outcomes],
            "texts": [result.to_json() for result in self.results],
        }

    def print_to(self, console: Console) -> None:
        for result in self.results:
            console.print(render_table(result, self.outcomes))
        others = "other programs used {:.1f} cores before it and {:.1f} after".format(*self.busy_cores)
        tokens = ", ".join(f"{outcome.tool.name} {outcome.calibration_tokens}" for outcome in self.outcomes)
        versions = "; ".join(f"{outcome.tool.name}: {_list(outcome.cost.versions)}" for outcome in self.outcomes)
        for line in (
            f"CPU: {self.cpu.name}; {' '.join(self.cpu.relevant_flags)}; {usable_cores()} usable cores",
            f"Run: {self.options.threads} threads a tool, one after the other; {others}",
            f"Calibration tokens of {self.options.calibration.name}: {tokens}",
            f"Versions: awq-serve {own_version()}, Python {platform.python_version()}; {versions}",
            CAVEAT,
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    try:
        return run_to_exit_code(lambda: measure_and_print(lambda: run(options), options.json_path))
    except QuantError as error:
        announce(f"error: {error}")
        return error.exit_code


def parse_options(arguments: Sequence[str] | None) -> Options:
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if parsed.calib is None:
        parser.error(
            "a text to calibrate on is missing; give one that every tool reads and no table is about: "
            "make bench-quality CALIB=FILE, or --calib FILE"
        )
    texts = tuple(parsed.text or [HELD_OUT_TEXT])
    if any(parsed.calib.samefile(text) for text in texts):
        parser.error(f"{parsed.calib} is both calibrated on and measured on; give a text that no tool has seen")
    peers = {
        LLM_COMPRESSOR: Tool(LLM_COMPRESSOR.name, "awq", LLM_COMPRESSOR, parsed.llm_compressor_samples, 256),
        AUTO_ROUND: Tool(
            AUTO_ROUND.name, "sign-gradient", AUTO_ROUND, parsed.auto_round_samples, 512, parsed.auto_round_steps
        ),
    }
    plain = Tool(PLAIN_ROUNDING, Method.RTN.value)
    ours = [Tool(f"awq-serve {method.value}", method.value) for method in parsed.ours]
    return Options(
        calibration=parsed.calib,
        texts=texts,
        tools=(plain, *ours, *(peers[peer] for peer in parsed.peers)),
        num_windows=parsed.windows,
        threads=parsed.threads,
        json_path=parsed.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    searching = [method for method in Method if method is not Method.RTN]
    parser.add_argument("--calib", type=_text_file, metavar="FILE", help="UTF-8 text that every tool calibrates on")
    parser.add_argument(
        "--text",
        type=_text_file,
        action="append",
        metavar="FILE",
        help="UTF-8 text to measure on, a table each; several times for several; "
        "default: a short one that ships with awq-serve",
    )
    parser.add_argument("--ours", type=_methods, default=searching, metavar="METHODS", help=_choices(searching))
    parser.add_argument("--peers", type=_peers, default=[*PEERS.values()], metavar="PEERS", help=_choices(PEERS))
    for option, default, what in (
        ("--llm-compressor-samples", 16, "of 256 tokens"),
        ("--auto-round-samples", 64, "of 512 tokens"),
        ("--auto-round-steps", 200, "a block"),
        ("--windows", TextWindows.num_windows, f"of {WINDOW_TOKENS} tokens to measure on, at most"),
        ("--threads", usable_cores(), "of each tool"),
    ):
        parser.add_argument(
            option, type=positive_number, metavar="N", default=default, help=f"{what}; default: {default}"
        )
    parser.add_argument("--json", type=writable_file, metavar="PATH", help="keep every figure in this file")
    return parser


def run(options: Options) -> Report:
    """Make the environments, run the tools one by one, measure them. Raises BenchmarkError or QuantError."""
    cpu = parse_cpuinfo(CPUINFO.read_text())
    gguf = find_gguf()
    for peer in options.peers:
        make_environment(peer, CACHE, announce)
    model = prepare_dense(gguf, CACHE / "models", announce)
    # before the long work: a text that is too short is refused, not found out
    windows = read_windows(open_source(model).tokenizer, options)
    busy_before = measure_busy_cores()
    outcomes = tuple(_run_tool(tool, model, options) for tool in options.tools)
    busy_after = measure_busy_cores()
    results = measure(model, outcomes, windows, options)
    return Report(cpu, options, (busy_before, busy_after), outcomes, results)


def read_windows(tokenizer: PreTrainedTokenizerBase, options: Options) -> dict[Path, Tensor]:
    """The token windows of each text to measure on. Raises RecipeError or BenchmarkError for a text that is too short.

    The calibration text must be long enough for the tools whose number of tokens is decided here.
    """
    num_tokens = len(tokenizer(options.calibration.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    for tool in options.tools:
        num_needed = (tool.num_samples or 0) * (tool.sample_tokens or 0)
        if num_tokens < num_needed:
            raise BenchmarkError(
                f"{options.calibration} has {num_tokens} tokens, and {tool.name} calibrates on {num_needed}: "
                "give a longer text or fewer samples"
            )
    cutting = TextWindows(num_windows=options.num_windows, window_tokens=WINDOW_TOKENS)
    return {text: cut_windows(tokenizer, text.read_text(encoding="utf-8"), cutting) for text in options.texts}


def measure(
    model: Path, outcomes: Sequence[Outcome], windows: Mapping[Path, Tensor], options: Options
) -> tuple[TextResult, ...]:
    """All models on all texts, in float32 on the CPU, from the files that the tools left. Holds all of them at once."""
    torch.set_num_threads(options.threads)
    models = {ORIGINAL: open_source(model).model}
    for outcome in outcomes:
        job = _job(outcome.tool, model, options)
        models[outcome.tool.name] = load_dense(job.dense if job.dense.is_dir() else job.checkpoint)
    results = []
    with torch.inference_mode():
        for text, token_windows in windows.items():
            rows = compare(models, token_windows, ProgressMeter(_tell_quarters(text.name)))
            results.append(TextResult(text.name, token_windows.shape[0], token_windows.shape[1], rows))
    return tuple(results)


def _run_tool(tool: Tool, model: Path, options: Options) -> Outcome:
    announce(f"running {tool.name}")
    job = _job(tool, model, options)
    cost = run_tool(tool, job, CACHE, options.threads, announce)
    announce(f"{tool.name}: {cost.seconds:.0f} s, {cost.peak_memory_bytes / 1e9:.2f} GB")
    if tool.peer:
        num_tokens = (tool.num_samples or 0) * (tool.sample_tokens or 0)
    else:
        calibration = json.loads((job.checkpoint / REPORT_FILE).read_text(encoding="utf-8"))["calibration"]
        num_tokens = calibration["num_tokens"] if calibration else 0
    return Outcome(tool, cost, num_tokens, measure_bits_per_weight(model, job.checkpoint))


def _job(tool: Tool, model: Path, options: Options) -> Job:
    folder = tool.name.replace(" ", "-")
    return tool.job(model, CACHE / "quality" / folder, options.calibration)


def _tell_quarters(text: str) -> ProgressListener:
    def listen(phase: str, done: int, total: int, seconds_left: float | None) -> None:
        if seconds_left is not None and done * 4 // total > (done - 1) * 4 // total:
            announce(f"{phase} {text}: {done} of {total} windows, about {seconds_left:.0f} s left")

    return listen


def _text_file(text: str) -> Path:
    path = Path(text)
    try:
        is_empty = not path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read as UTF-8 text: {error}") from error
    if is_empty:
        raise argparse.ArgumentTypeError(f"{text} is empty")
    return path


def _methods(text: str) -> list[Method]:
    known = {method.value: method for method in Method if method is not Method.RTN}
    return _pick(text, known)


def _peers(text: str) -> list[Peer]:
    return _pick(text, PEERS)


def _pick(text: str, known: Mapping[str, Choice]) -> list[Choice]:
    """What a comma-separated list names, in its order, once each; `none` names nothing."""
    names = [] if text == NONE else [*dict.fromkeys(text.split(","))]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r} is none of {', '.join(known)}")
    return [known[name] for name in names]


def _choices(names: Iterable[str]) -> str:
    return f"which, separated by commas, or {NONE}; default: all ({', '.join(names)})"


def _list(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {number}" for package, number in versions.items())


if __name__ == "__main__":
    # ended from outside, it ends its tool as Ctrl-C does: nothing goes on for half an hour that nobody waits for
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    sys.exit(main())
