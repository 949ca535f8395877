"""What a quantizer's process is asked for and what it answers, as files: the two may run on different Pythons.

Standard library alone. Every tool is timed by this module, from the model's files to the checkpoint's files; starting
Python and importing are not counted.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

BITS = 4
GROUP_SIZE = 64
PROCESS_STATUS = Path("/proc/self/status")
PEAK_MEMORY_FIELD = "VmHWM:"


@dataclass(frozen=True)
class Job:
    """Quantize the directory `model` into `output`/checkpoint, or what only the tool can read back, also dense.

    text: the UTF-8 file to calibrate on. num_samples, sample_tokens: None leaves it to the tool; so does steps, the
    optimization steps a block, where a tool takes some.
    """

    model: str
    output: str
    text: str
    method: str
    num_samples: int | None = None
    sample_tokens: int | None = None
    steps: int | None = None

    @property
    def checkpoint(self) -> Path:
        """Where the tool's files go, as it saves them."""
        return Path(self.output) / "checkpoint"

    @property
    def dense(self) -> Path:
        """Where a tool whose format we do not read writes what it reads back of its files, multiplied out."""
        return Path(self.output) / "dense"

    @classmethod
    def read(cls, file: Path) -> "Job":
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))

    def read_rows(self, tokenize: Callable[[str], Sequence[int]]) -> list[list[int]]:
        """The calibration text as num_samples rows of sample_tokens tokens."""
        if self.num_samples is None or self.sample_tokens is None:
            raise ValueError(f"the job of {self.method} does not say how many rows to cut")
        token_ids = tokenize(Path(self.text).read_text(encoding="utf-8"))
        return cut_rows(token_ids, self.num_samples, self.sample_tokens)


def cut_rows(token_ids: Sequence[int], num_rows: int, num_tokens: int) -> list[list[int]]:
    """Rows spread evenly over the text, without overlap, as our own calibration cuts them."""
    stride = len(token_ids) // num_rows
    if stride < num_tokens:
        raise ValueError(f"{len(token_ids)} tokens are fewer than {num_rows} rows of {num_tokens}")
    return [list(token_ids[start : start + num_tokens]) for start in range(0, stride * num_rows, stride)]


@dataclass(frozen=True)
class Cost:
    """What a quantization took. peak_memory_bytes: the most that its process had in memory at once."""

    seconds: float
    peak_memory_bytes: int
    versions: Mapping[str, str]

    @classmethod
    def of(cls, quantize: Callable[[], None], packages: Sequence[str]) -> "Cost":
        """Run it, and say what it took and which versions of the packages did it."""
        start_s = time.perf_counter()
        quantize()
        seconds = time.perf_counter() - start_s
        versions = {package: version(package) for package in packages}
        return cls(seconds, parse_peak_memory(PROCESS_STATUS.read_text()), versions)

    @classmethod
    def read(cls, file: Path) -> "Cost":
        return cls(**json.loads(file.read_text()))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


def parse_peak_memory(status: str) -> int:
    """Bytes, from /proc/self/status. getrusage would count the parent's memory, too, where it is larger."""
    line = next(line for line in status.splitlines() if line.startswith(PEAK_MEMORY_FIELD))
    return int(line.split()[1]) * 1024
