"""One quantized demo model and one running server for the whole folder: both are the real thing."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.running_server import RunningServer, start_server


@pytest.fixture(scope="session")
def quantized_demo(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as `awq-serve quantize` makes it, from little calibration text to save time."""
    output = tmp_path_factory.mktemp("quantized") / "SmolLM2-135M-Instruct-awq"
    command = [sys.executable, "-m", "quant", "quantize", str(demo_gguf), str(output)]
    command += ["--method", "awq", "--calib-samples", "16", "--calib-seqlen", "128"]
    command += ["--no-eval", "--progress-format", "json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


@pytest.fixture(scope="session")
def server(quantized_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = start_server(
        quantized_demo, tmp_path_factory.mktemp("data"), "--served-model-name", "demo", "--max-model-len", "1024"
    )
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers for one test; those that the test has not stopped are killed after it."""
    servers: list[RunningServer] = []

    def start_one(model: Path, data_dir: Path, *options: str) -> RunningServer:
        servers.append(start_server(model, data_dir, *options))
        return servers[-1]

    yield start_one
    for server in servers:
        server.process.kill()
        server.process.wait()
