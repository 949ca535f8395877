"""Starts the real program as a subprocess on a free port and talks to it as a client would."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

AWQ_SERVE = Path(sys.executable).parent / "awq-serve"
START_DEADLINE_SECONDS = 120.0
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class RunningServer:
    """A served model: where it listens, its process, and what it printed."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="not-needed", max_retries=0, timeout=120)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="not-needed", max_retries=0, timeout=240)

    def metric(self, name: str) -> float:
        """The value of a metric without labels, or the sum over its labels."""
        text = httpx.get(f"{self.url}/metrics").text
        values = re.findall(rf"^awq_serve_{name}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"no metric awq_serve_{name} in:\n{text}"
        return sum(map(float, values))

    def engine_pid(self) -> int:
        """The child that runs the model."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if b"server.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        raise AssertionError(f"no engine among the children {children} of {self.process.pid}")

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """Ask the server to end as a process manager would; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def start_server(model: Path, data_dir: Path, *options: str) -> RunningServer:
    """`awq-serve serve MODEL` on a free port, ready to answer. Fails with its log when it does not get ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "server.log"
    command = [str(AWQ_SERVE), "serve", str(model), "--port", str(port), "--data-dir", str(data_dir), *options]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env={**os.environ})
    server = RunningServer(process, port, log)
    wait_until(lambda: server.is_ready() or process.poll() is not None, START_DEADLINE_SECONDS, log)
    assert process.poll() is None, log.read_text()
    return server


def wait_until(condition: Callable[[], bool], deadline_seconds: float, log: Path | None = None) -> None:
    """Return as soon as the condition holds; fail, with the log, when the deadline passes first."""
    end = time.monotonic() + deadline_seconds
    while not condition():
        words = log.read_text()[-4000:] if log else ""
        assert time.monotonic() < end, f"not within {deadline_seconds} s\n{words}"
        time.sleep(POLL_SECONDS)
