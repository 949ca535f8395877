"""Our side as a client sees it: the whole server, its streams over HTTP. Standard library alone, but for the server."""

import asyncio
import http.client
import json
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from benchmarks.errors import BenchmarkError
from benchmarks.workload import Trial

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 300
END_SECONDS = 60
POLL_SECONDS = 0.1
MODEL_NAME = "demo"


class OwnServer:
    """A Side, and a context manager: the server lives as long as the context."""

    def __init__(self, checkpoint: Path, num_threads: int) -> None:
        """Raises BenchmarkError when the server does not get ready."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._data = tempfile.TemporaryDirectory()
        self._log = Path(self._data.name) / "server.log"
        command = [sys.executable, "-m", "server.cli", "serve", str(checkpoint), "--port", str(self._port)]
        command += ["--served-model-name", MODEL_NAME, "--data-dir", self._data.name, "--num-threads", str(num_threads)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "OwnServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def run(self, trial: Trial) -> float:
        """Seconds that the timed tokens take at the speed of the time in which every stream was giving tokens.

        A piece of a stream counts as one token: text that waits for the rest of a character comes with the next one.
        """
        streams = asyncio.run(self._stream_all(trial))
        start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
        num_tokens = sum(start < at <= end for times in streams for at in times)
        if not num_tokens:
            raise BenchmarkError("our server's streams were never under way together")
        return len(trial.prompts) * trial.decode_tokens * (end - start) / num_tokens

    async def _stream_all(self, trial: Trial) -> list[list[float]]:
        return await asyncio.gather(*(self._stream(prompt, 1 + trial.decode_tokens) for prompt in trial.prompts))

    async def _stream(self, prompt: tuple[int, ...], num_tokens: int) -> list[float]:
        """When each piece came."""
        request = {
            "model": MODEL_NAME, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True,
            "ignore_eos": True,
        }  # fmt: skip
        body = json.dumps(request).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head.encode() + body)
        times = [time.perf_counter() async for line in reader if line.startswith(b"data: {")]
        writer.close()
        if not times:
            raise BenchmarkError(f"our server answered a stream with nothing; its log:\n{self._log.read_text()}")
        return times

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchmarkError(f"our server did not get ready; its log:\n{self._log.read_text()}")
            time.sleep(POLL_SECONDS)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        with suppress(OSError):
            connection.request("GET", "/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        return False

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._data.cleanup()
