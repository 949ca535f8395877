"""The most host memory that loading takes beyond what stays, on a random model that is made on the spot.

The promise is one shard and 1 GB, for a model of any size and any device.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import EXIT_INTERRUPTED, announce, positive_number, writable_file
from benchmarks.errors import BenchmarkError
from benchmarks.json_file import write_json
from benchmarks.random_model import ModelShape, write_random_model

REST_BYTES = 10**9
# what a load is of: the checkpoint, and the kernels that its layout is for
LOADS = (("dense", "torch"), ("4 bits", "torch"), ("4 bits", "native"))


@dataclass(frozen=True)
class Measurement:
    """Of one checkpoint, in bytes of the host: of its files, what its model holds after loading, what loading took
    beyond that, and how much that may be."""

    weights: str
    kernels: str
    device: str
    stored_bytes: int
    kept_bytes: int
    beyond_bytes: int
    bound_bytes: int


def measure(model: Path, weights: str, kernels: str, device: str) -> Measurement:
    """Load the checkpoint in a process of its own."""
    files = [file.stat().st_size for file in model.glob("*.safetensors")]
    announce(f"loading {weights} for {kernels} on {device}: {len(files)} files, {sum(files) / 1e9:.2f} GB")
    command = [sys.executable, "-m", "benchmarks.loader_memory_worker", str(model), device, kernels]
    found = json.loads(_run(command).splitlines()[-1])
    return Measurement(
        weights,
        kernels,
        device,
        stored_bytes=sum(files),
        kept_bytes=found["after"] - found["before"],
        beyond_bytes=found["peak"] - max(found["after"], found["before"]),
        bound_bytes=max(files) + REST_BYTES,
    )


def render(measurements: Sequence[Measurement]) -> Table:
    """One row a load."""
    table = Table(title="memory in GB", title_justify="left")
    for column in ("weights", "kernels", "device"):
        table.add_column(column)
    for column in ("files", "kept", "beyond", "bound", "of bound"):
        table.add_column(column, justify="right")
    for row in measurements:
        sizes = (row.stored_bytes, row.kept_bytes, row.beyond_bytes, row.bound_bytes)
        table.add_row(
            row.weights,
            row.kernels,
            row.device,
            *(f"{size / 1e9:.2f}" for size in sizes),
            f"{row.beyond_bytes / row.bound_bytes:.0%}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where a load took more than its bound."""
    options = _parser().parse_args(arguments)
    shape = ModelShape.of_width(options.width, num_blocks=options.blocks, vocab_size=options.vocab)
    try:
        measurements = _measure_all(shape, "cuda" if torch.cuda.is_available() else "cpu")
    except BenchmarkError as error:
        announce(str(error))
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    Console().print(render(measurements))
    if options.json is not None:
        write_json(options.json, {"shape": asdict(shape), "measurements": [asdict(row) for row in measurements]})
    return int(any(row.beyond_bytes > row.bound_bytes for row in measurements))


def _measure_all(shape: ModelShape, device: str) -> list[Measurement]:
    with tempfile.TemporaryDirectory(prefix="awq-serve-memory-") as folder:
        models = {"dense": Path(folder) / "dense", "4 bits": Path(folder) / "packed"}
        write_random_model(models["dense"], shape)
        command = [sys.executable, "-m", "quant", "quantize", str(models["dense"]), str(models["4 bits"])]
        _run([*command, "--method", "rtn", "--no-eval"])
        return [
            measure(models[weights], weights, kernels, device)
            for weights, kernels in LOADS
            if device == "cpu" or kernels != "native"
        ]


def _run(command: Sequence[str]) -> str:
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode != 0:
        raise BenchmarkError(f"{' '.join(command[1:4])} failed: {ended.stderr.strip()}")
    return ended.stdout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=positive_number, default=8, help="default: 8")
    parser.add_argument("--width", type=positive_number, default=2048, help="of the hidden states; default: 2048")
    parser.add_argument("--vocab", type=positive_number, default=32000, help="tokens; default: 32000")
    parser.add_argument("--json", type=writable_file, help="a file for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
