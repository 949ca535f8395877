"""The most memory that quantizing takes, beside what is promised, on a random model that is made on the spot.

The promise is 1.5 times a block in float32 and 2 GB, for a model of any size.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.command_line import EXIT_INTERRUPTED, announce, positive_number, writable_file
from benchmarks.errors import BenchmarkError
from benchmarks.json_file import write_json
from benchmarks.random_model import ModelShape, write_random_model
from quant.method import STEPS, Method
from quant.report import REPORT_FILE

BLOCK_SHARE, REST_BYTES = 1.5, 2 * 10**9
BYTES_PER_PARAMETER = 4
# a text of printable characters: the tokenizer's tokens are bytes
TEXT = "".join(chr(32 + 7 * number % 95) for number in range(95)) * 2000


@dataclass(frozen=True)
class Measurement:
    """Of one method on the model: the process's peak, program and mapped files included, and the bound."""

    method: str
    peak_bytes: int
    bound_bytes: int
    seconds: float


def measure(model: Path, shape: ModelShape, method: Method, options: Sequence[str]) -> Measurement:
    """Quantize the model in a process of its own, which says in its report what it took."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        out = Path(folder) / "out"
        command = [sys.executable, "-m", "quant", "quantize", str(model), str(out), "--method", method, *options]
        announce(
            f"{method}: {shape.num_blocks} blocks, {BYTES_PER_PARAMETER * shape.parameters / 1e9:.1f} GB in float32"
        )
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode != 0:
            raise BenchmarkError(f"{method} failed: {ended.stderr.strip()}")
        report = json.loads((out / REPORT_FILE).read_text(encoding="utf-8"))
    bound_bytes = int(BLOCK_SHARE * BYTES_PER_PARAMETER * shape.block_parameters) + REST_BYTES
    return Measurement(method, report["peak_memory_bytes"], bound_bytes, report["seconds"])


def render(shape: ModelShape, measurements: Sequence[Measurement]) -> Table:
    """One row a method."""
    block_bytes, all_bytes = (BYTES_PER_PARAMETER * count for count in (shape.block_parameters, shape.parameters))
    table = Table(
        title=f"a model of {all_bytes / 1e9:.2f} GB in float32, {shape.num_blocks} blocks of {block_bytes / 1e9:.2f}",
        title_justify="left",
    )
    table.add_column("method")
    for column in ("peak", "bound", "peak / bound", "time"):
        table.add_column(column, justify="right")
    for row in measurements:
        table.add_row(
            row.method,
            f"{row.peak_bytes / 1e9:.2f} GB",
            f"{row.bound_bytes / 1e9:.2f} GB",
            f"{row.peak_bytes / row.bound_bytes:.2f}",
            f"{row.seconds:.0f} s",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a peak is above its bound."""
    options = _parser().parse_args(arguments)
    shape = ModelShape.of_width(options.width, num_blocks=options.blocks, vocab_size=options.vocab)
    try:
        measurements = _measure_all(shape, options.methods, options.samples, options.tokens)
    except BenchmarkError as error:
        announce(str(error))
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    Console().print(render(shape, measurements))
    if options.json is not None:
        write_json(options.json, {"shape": asdict(shape), "measurements": [asdict(row) for row in measurements]})
    return int(any(row.peak_bytes > row.bound_bytes for row in measurements))


def _measure_all(shape: ModelShape, methods: Sequence[Method], samples: int, tokens: int) -> list[Measurement]:
    with tempfile.TemporaryDirectory(prefix="awq-serve-memory-") as folder:
        text, model = Path(folder) / "text.txt", Path(folder) / "model"
        text.write_text(TEXT, encoding="ascii")
        write_random_model(model, shape)
        options = ("--calib", f"{text}:1", "--calib-samples", str(samples), "--calib-seqlen", str(tokens))
        return [measure(model, shape, method, options if STEPS[method].calibrates else ()) for method in methods]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=positive_number, default=24, help="default: 24")
    parser.add_argument("--width", type=positive_number, default=1024, help="of the hidden states; default: 1024")
    parser.add_argument("--vocab", type=positive_number, default=32000, help="tokens; default: 32000")
    parser.add_argument("--samples", type=positive_number, default=32, help="rows of calibration text; default: 32")
    parser.add_argument("--tokens", type=positive_number, default=512, help="tokens a row; default: 512")
    parser.add_argument(
        "--methods", type=Method, nargs="+", default=[Method.RTN, Method.GPTQ], help="default: rtn gptq"
    )
    parser.add_argument("--json", type=writable_file, help="a file for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
