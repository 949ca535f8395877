"""The engine's sign of life: a thread of the child writes to a pipe, whatever the steps do; the parent misses it.

A step may take minutes and the thread goes on; a process that is stopped or swapped out says nothing.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

_READ_BYTES = 4096


@dataclass(frozen=True)
class HeartbeatPolicy:
    """After silent_seconds without a beat the engine takes no requests, after dead_seconds it is killed."""

    beat_seconds: float = 1.0
    silent_seconds: float = 10.0
    dead_seconds: float = 120.0


def start_beating(descriptor: int, beat_seconds: float) -> None:
    """The child's side: write to the pipe from a thread of its own until the process ends."""
    os.set_blocking(descriptor, False)
    Thread(target=_beat, args=(descriptor, beat_seconds), name="heartbeat", daemon=True).start()


def _beat(descriptor: int, beat_seconds: float) -> None:
    while True:
        # a parent that does not read for long has beats enough in the pipe
        with suppress(BlockingIOError):
            os.write(descriptor, b".")
        time.sleep(beat_seconds)


class Pulse:
    """The parent's side of one child: hears its beats and counts the missing ones."""

    def __init__(self, policy: HeartbeatPolicy) -> None:
        self._policy = policy
        self._reading, self.writing = os.pipe()
        os.set_blocking(self._reading, False)
        self._has_begun = asyncio.Event()
        self._num_missed = 0

    def listen(self) -> None:
        """Once the child has the writing end, which is closed here."""
        os.close(self.writing)
        asyncio.get_running_loop().add_reader(self._reading, self._take_beats)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._reading)
        os.close(self._reading)

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Call tell(False) when the beats stay away and tell(True) when they are back; return when it is too long.

        Counted in turns of this loop and not by the clock: when the machine or this process slept, the child may have
        too. It begins with the first beat, as importing torch may take long and holds the interpreter's lock.
        """
        await self._has_begun.wait()
        is_alive = True
        while self._num_missed * self._policy.beat_seconds < self._policy.dead_seconds:
            await asyncio.sleep(self._policy.beat_seconds)
            self._num_missed += 1
            if (self._num_missed * self._policy.beat_seconds < self._policy.silent_seconds) != is_alive:
                is_alive = not is_alive
                tell(is_alive)

    def _take_beats(self) -> None:
        if not os.read(self._reading, _READ_BYTES):
            # the child has ended, and with it the other end
            asyncio.get_running_loop().remove_reader(self._reading)
            return
        self._num_missed = 0
        self._has_begun.set()
