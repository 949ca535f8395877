"""Phase 1: what the device is, and how fast its memory really is: the yardstick of all that follows."""

import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.command_line import own_version
from benchmarks.gpu_phases.bench import Bench, Item, Side
from benchmarks.gpu_phases.datasheet import Datasheet, datasheet_of
from benchmarks.gpu_phases.figures import Figure
from benchmarks.gpu_phases.stopwatch import Timing
from benchmarks.machine import CPUINFO, parse_cpuinfo

PHASE = "machine"
COPY_TABLE = "Memory bandwidth"
BEST_COPY = "best copy"
NVIDIA_SMI_FIELDS = (
    "driver_version", "power.limit", "power.draw", "temperature.gpu", "clocks.sm", "clocks.max.sm", "clocks.mem",
    "clocks.max.mem", "ecc.mode.current",
)  # fmt: skip
NVIDIA_SMI_SECONDS = 20
GIGA = 1e9


def plan(bench: Bench) -> Sequence[Item]:
    return [
        Item("device and versions", lambda: _describe(bench)),
        Item("copy bandwidth", lambda: _measure_copies(bench)),
        Item("read bandwidth", lambda: _measure_reads(bench)),
    ]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{parse_cpuinfo(CPUINFO.read_text()).name}, Triton interpreted"


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a second, read and written, of the fastest copy; measured now where the phase did not run."""
    for figure in bench.findings.of(PHASE):
        found = figure.number("GB/s")
        if figure.name == BEST_COPY and found is not None:
            return found * GIGA
    for figure in _measure_copies(bench):
        bench.findings.add(PHASE, figure)
    return copy_bandwidth(bench)


def data_sheet(bench: Bench) -> Datasheet | None:
    """The vendor's figures, where the device is known."""
    return datasheet_of(torch.cuda.get_device_name(bench.device)) if bench.device.type == "cuda" else None


def ask_nvidia_smi(fields: Sequence[str]) -> dict[str, str]:
    """What the tool says of the first GPU; nothing where there is no tool, no answer, or no such field."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS)
    except subprocess.CalledProcessError:
        # one field that this driver does not know spoils them all
        return (
            {}
            if len(fields) == 1
            else {key: value for field in fields for key, value in ask_nvidia_smi([field]).items()}
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(fields, (value.strip() for value in answer.stdout.strip().split(",")), strict=False))


def _describe(bench: Bench) -> Iterator[Figure]:
    facts = {
        "device": device_name(bench.device),
        "awq-serve": own_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "CUDA of torch": str(torch.version.cuda),
    }
    if bench.device.type == "cuda":
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory": f"{properties.total_memory / GIGA:.1f} GB",
            "L2 cache": f"{bench.cache_bytes / 2**20:.0f} MiB",
        }
    sheet = data_sheet(bench)
    if sheet is not None:
        facts["datasheet bandwidth"] = f"{sheet.bytes_per_second / GIGA:.0f} GB/s"
        facts["datasheet fp16"] = f"{sheet.half_flops / 1e12:.0f} TFLOP/s"
    for name, value in {**facts, **ask_nvidia_smi(NVIDIA_SMI_FIELDS)}.items():
        yield Figure("Device", name, {"value": value})


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def _measure_copies(bench: Bench) -> Iterator[Figure]:
    """Copies between buffers that the L2 cache does not hold; bytes count twice, read and written."""
    best = 0.0
    for num_bytes in bench.sizes.copy_bytes:
        source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
        source.random_(0, 256)
        side = Side([partial(target.copy_, source)], expected_seconds=1e-3)
        timing = bench.time({"copy": side})["copy"]
        best = max(best, 2 * num_bytes / timing.median)
        yield _bandwidth(f"copy of {num_bytes / 2**20:.0f} MiB", 2 * num_bytes, timing)
    yield Figure(COPY_TABLE, BEST_COPY, {"GB/s": best / GIGA})


def _measure_reads(bench: Bench) -> Iterator[Figure]:
    """The largest of some numbers: nearly nothing is written, as when weights are read."""
    num_bytes = max(bench.sizes.copy_bytes)
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=bench.device).normal_()
    timing = bench.time({"read": Side([source.max], expected_seconds=1e-3)})["read"]
    yield _bandwidth(f"read of {num_bytes / 2**20:.0f} MiB (torch.max)", num_bytes, timing)


def _bandwidth(name: str, num_bytes: int, timing: Timing) -> Figure:
    values = {
        "GB/s": num_bytes / timing.median / GIGA,
        "slowest tenth": num_bytes / timing.p90 / GIGA,
        "fastest tenth": num_bytes / timing.p10 / GIGA,
    }
    return Figure(COPY_TABLE, name, values)
