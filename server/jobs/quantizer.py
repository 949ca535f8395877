"""One quantizer process: starts it, follows what it says, ends it. Knows no job and no store."""

import asyncio
import os
import signal
import sys
from asyncio import StreamReader
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from server.jobs.events import DoneEvent, FailedEvent, WorkEvent, parse_event

# the report of a model with hundreds of layers is one line; more than this is a fault
MAX_LINE_BYTES = 16 * 2**20
SWEEP_SECONDS = 0.1
# the end of a traceback; more of it is no help to a client
TAIL_LINES = 5
TAIL_LINE_CHARS = 500


@dataclass(frozen=True)
class QuantizerExit:
    """How a quantizer ended. returncode: negative for a signal. tail: its last words that were no event."""

    returncode: int
    report_json: str | None
    failure: str | None
    tail: Sequence[str]

    def describe(self) -> str:
        """Why it failed, as a sentence for the client."""
        if self.failure is not None:
            return self.failure
        words = f"; its last words: {' | '.join(self.tail)}" if self.tail else ""
        if self.returncode == -signal.SIGKILL:
            return f"the quantizer was killed (SIGKILL), as the system does when memory runs out{words}"
        if self.returncode < 0:
            return f"the quantizer was ended by {signal.Signals(-self.returncode).name}{words}"
        if self.returncode > 0:
            return f"the quantizer ended with exit code {self.returncode}{words}"
        return f"the quantizer ended without an error and without a checkpoint{words}"


class QuantizerProcess:
    """A running quantizer, in a process group of its own that dies with this server."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._report_json: str | None = None
        self._failure: str | None = None

    @classmethod
    async def start(cls, command: Sequence[str]) -> "QuantizerProcess":
        """Raises OSError when the system cannot start another process.

        Must be called on the thread that lives as long as the server: the kernel ends the child with that thread.
        """
        launch = [sys.executable, "-m", "server.jobs.launch", str(os.getpid()), *command]
        process = await asyncio.create_subprocess_exec(
            *launch, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, start_new_session=True, limit=MAX_LINE_BYTES
        )
        return cls(process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def follow(self, on_event: Callable[[WorkEvent], Awaitable[None]]) -> QuantizerExit:
        """Read both pipes to their end, hand on what it says of its work, and return how it ended. Call it once."""
        await asyncio.gather(self._read_events(on_event), self._read_errors(), self._sweep_group())
        returncode = await self._process.wait()
        return QuantizerExit(returncode, self._report_json, self._failure, tuple(self._tail))

    async def stop(self, number: signal.Signals, grace_seconds: float) -> None:
        """Send this signal, then SIGKILL when it still runs after the grace. `follow` must be running beside it."""
        self._signal_group(number)
        try:
            await asyncio.wait_for(self._process.wait(), grace_seconds)
        except TimeoutError:
            self._signal_group(signal.SIGKILL)

    async def _read_events(self, on_event: Callable[[WorkEvent], Awaitable[None]]) -> None:
        async for line in _lines(self._process.stdout):
            event = parse_event(line)
            if isinstance(event, WorkEvent):
                await on_event(event)
            elif isinstance(event, DoneEvent):
                self._report_json = bytes(event.report).decode()
            elif isinstance(event, FailedEvent):
                self._failure = event.message
            else:
                self._remember(line)

    async def _read_errors(self) -> None:
        async for line in _lines(self._process.stderr):
            self._remember(line)

    async def _sweep_group(self) -> None:
        """End what the quantizer started and left behind: it would hold the pipes open, and their end never come."""
        # not Process.wait(), which in some versions of asyncio waits for the pipes itself
        while self._process.returncode is None:
            await asyncio.sleep(SWEEP_SECONDS)
        self._signal_group(signal.SIGKILL)

    def _remember(self, line: bytes) -> None:
        if text := line.decode(errors="replace").strip():
            self._tail.append(text[:TAIL_LINE_CHARS])

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


async def _lines(stream: StreamReader | None) -> AsyncIterator[bytes]:
    """The lines of a pipe until it ends, without those that are longer than MAX_LINE_BYTES."""
    if stream is None:
        raise AssertionError("the quantizer was started without a pipe")
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            # the reader has dropped the overlong line; the rest follows
            continue
        if not line:
            return
        yield line
