"""One life of the engine's process, seen from the API: spawn, send, hear, end. Decides nothing about restarts."""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from server.engine import messages
from server.engine.config import EngineConfig
from server.engine.heartbeat import HeartbeatPolicy, Pulse
from server.engine.messages import PROTOCOL_VERSION, FromEngine, Start, ToEngine

# after the process has ended, how long its last messages may take to come out of the socket
_LAST_WORDS_MS = 100
_STDERR = 2
# without news, whatever its heart does: a step says something when it ends, an idle engine every second; a long prompt
# of a large model on a CPU takes minutes
NEWS_LIMIT_SECONDS = 900.0


class _Endpoint:
    """A ZeroMQ pair in a directory that only this user can enter."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="awq-serve-"))
        self._context = zmq.asyncio.Context()
        self.address = f"ipc://{self._directory}/engine"
        self.socket = self._context.socket(zmq.PAIR)
        # without bound: the requests under way are bounded, and so is what each can say
        self.socket.set(zmq.SNDHWM, 0)
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.bind(self.address)

    def hide(self) -> None:
        """Once the two are connected nobody needs the path, and a parent that is killed cannot remove it any more."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        self._context.destroy(linger=0)
        self.hide()


class EngineChild:
    """A process and its socket. Each life has a socket of its own, so no message of an earlier one is ever read."""

    def __init__(self, process: asyncio.subprocess.Process, endpoint: _Endpoint, pulse: Pulse) -> None:
        self._process = process
        self._endpoint = endpoint
        self._pulse = pulse
        self._why_killed: str | None = None
        self._socket = endpoint.socket
        self._last_heard = time.monotonic()

    @classmethod
    async def spawn(cls, config: EngineConfig, heartbeat: HeartbeatPolicy) -> "EngineChild":
        """Start the process and hand it its settings. Raises OSError when the machine cannot."""
        endpoint = _Endpoint()
        pulse = Pulse(heartbeat)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            # not the current directory, which may hold a folder named like one of our packages
            "-P",
            "-m",
            "server.engine.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=_STDERR,
            pass_fds=(pulse.writing,),
            env=_environment(),
        )
        start = Start(PROTOCOL_VERSION, endpoint.address, os.getpid(), pulse.writing, heartbeat.beat_seconds, config)
        pulse.listen()
        assert process.stdin is not None
        process.stdin.write(messages.encode_start(start))
        process.stdin.close()
        return cls(process, endpoint, pulse)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        self._socket.send(messages.encode(message))

    async def hear(self, handle: Callable[[FromEngine], None], tell_alive: Callable[[bool], None]) -> str:
        """Hand over every message until the process has ended; returns how it ended.

        tell_alive: called with False when its heartbeat stays away, with True when it is back. It is killed when that
        takes too long, or when no message comes for very long.
        """
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(handle))
                news_watch = group.create_task(self._watch_news())
                pulse_watch = group.create_task(self._watch_pulse(tell_alive))
                exit_status = await self._process.wait()
                for task in (reader, news_watch, pulse_watch):
                    task.cancel()
            while await self._socket.poll(_LAST_WORDS_MS):
                handle(messages.decode_from_engine(await self._socket.recv()))
        finally:
            self.kill()
            self._endpoint.close()
            self._pulse.close()
        return self._why_killed or _describe(exit_status)

    def terminate(self) -> None:
        """Ask it to finish what it has and end."""
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def wait_until_ended(self, seconds: float) -> None:
        """Wait for the end; kill it when the time is up."""
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            self.kill()
            await self._process.wait()

    async def _read(self, handle: Callable[[FromEngine], None]) -> None:
        frame = await self._socket.recv()
        self._endpoint.hide()
        while True:
            self._last_heard = time.monotonic()
            handle(messages.decode_from_engine(frame))
            frame = await self._socket.recv()

    async def _watch_news(self) -> None:
        while (left := self._last_heard + NEWS_LIMIT_SECONDS - time.monotonic()) > 0:
            await asyncio.sleep(left)
        self._why_killed = f"the engine's process said nothing for {NEWS_LIMIT_SECONDS:g} s and was killed"
        self.kill()

    async def _watch_pulse(self, tell_alive: Callable[[bool], None]) -> None:
        await self._pulse.watch(tell_alive)
        self._why_killed = "the engine's process gave no sign of life for too long and was killed"
        self.kill()


def _environment() -> dict[str, str]:
    """The child finds the very packages that this process found, whatever its own start-up would add.

    Its threads sleep while they wait for each other, unless the environment says otherwise. Spinning, as torch does by
    itself, is a seventh faster where nothing else runs and collapses where something does. The demo model on two cores,
    tokens a second of one and of eight sequences, spinning against sleeping: alone 28 and 99 against 24 and 86; beside
    a job's quantization, which is niced, 16 and 65 against 20 and 46; beside one that is not 1 and 6 against 8 and 26.
    """
    search_path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": search_path}


def _describe(exit_status: int) -> str:
    if exit_status == -signal.SIGKILL:
        return "the engine's process was killed (SIGKILL; the kernel does so when memory runs out)"
    if exit_status < 0:
        return f"the engine's process was ended by {signal.Signals(-exit_status).name}"
    return f"the engine's process ended with exit status {exit_status}"
