"""What may import what, beyond the contracts that import-linter holds: start-up cost and the name `kernels`."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import is_kernels_available

from benchmarks.gpu_phases.phases import PHASES

ROOT = Path(__file__).resolve().parent.parent


def modules_after_importing(name: str) -> set[str]:
    program = f"import sys, {name}; print('\\n'.join(sys.modules))"
    listing = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listing.stdout.split())


def test_import_contracts_hold() -> None:
    linter = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert linter.returncode == 0, linter.stdout


@pytest.mark.parametrize("module", ["server.app", "server.cli"])
def test_the_api_process_stays_small(module: str) -> None:
    assert not modules_after_importing(module) & {"torch", "transformers", "triton"}


def test_a_bare_cuda_machine_can_run_the_engine_and_the_benchmark() -> None:
    # given a machine with torch, triton, transformers and safetensors, and none of these
    absent = ("fastapi", "uvicorn", "starlette", "pydantic", "pydantic_settings", "zmq", "msgspec", "orjson", "uvloop")
    absent += ("httptools", "structlog", "prometheus_client", "accelerate", "gguf", "matplotlib")
    # then all that runs there can be imported: a module that is None is one that cannot be found
    modules = ["kernels.dispatch", "server.model.loader", "server.engine.assembly", "server.engine.loop"]
    modules += ["benchmarks.cpu", "benchmarks.gpu", "benchmarks.gpu_phases.worker", *(phase.module for phase in PHASES)]
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_what_watches_over_the_gpu_benchmark_imports_no_torch() -> None:
    # a fault of the device, the driver or a library must not take the figures with it
    assert not modules_after_importing("benchmarks.gpu") & {"torch", "triton", "transformers"}


@pytest.mark.parametrize("module", ["kernels.dispatch", "server.model.loader", "quant.pipeline"])
def test_triton_loads_only_when_a_gpu_is_chosen(module: str) -> None:
    loaded = modules_after_importing(module)
    assert "kernels.gemv_int4" not in loaded


def test_transformers_does_not_take_our_kernels_for_the_public_distribution() -> None:
    assert not is_kernels_available()
