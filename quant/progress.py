"""What a running quantization tells: phases, counts, time left. JSON lines for programs, a bar for people."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from quant.report import BlockError, LayerLoss


class ProgressListener(Protocol):
    """Hears how far a phase is; seconds_left is the estimate for this phase, None before its first unit is done."""

    def __call__(self, phase: str, done: int, total: int, seconds_left: float | None) -> None: ...


def ignore_progress(phase: str, done: int, total: int, seconds_left: float | None) -> None:
    """A listener for callers that do not look."""


class BlockListener(Protocol):
    """Hears of a block that is finished, and of its linears."""

    def __call__(self, block: BlockError, layers: Sequence[LayerLoss]) -> None: ...


def ignore_block(block: BlockError, layers: Sequence[LayerLoss]) -> None:
    """A listener for callers that do not look."""


def ignore_notice(_sentence: str) -> None:
    """For callers that do not read what a run has to say on the way."""


class ProgressMeter:
    """Times the units of the current phase and tells the listener how many are done and how long the rest takes."""

    def __init__(self, listener: ProgressListener, clock: Callable[[], float] = time.monotonic) -> None:
        self._listener = listener
        self._clock = clock
        self._phase = ""
        self._start_s = 0.0
        self._start_done = 0

    def report(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` units of the phase are finished; a new phase starts the clock anew.

        What is done at its first report took none of its time: an earlier run did it.
        """
        now_s = self._clock()
        if phase != self._phase:
            self._phase, self._start_s, self._start_done = phase, now_s, done
        elapsed_s, num_timed = now_s - self._start_s, done - self._start_done
        seconds_left = elapsed_s / num_timed * (total - done) if num_timed and elapsed_s > 0 else None
        self._listener(phase, done, total, seconds_left)


class JsonLines:
    """One JSON object a line: the contract with the job service."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def on_progress(self, phase: str, done: int, total: int, seconds_left: float | None) -> None:
        """{"event": "progress", "phase", "done", "total", "seconds_left": seconds or null}"""
        rounded = None if seconds_left is None else round(seconds_left, 1)
        self._write({"event": "progress", "phase": phase, "done": done, "total": total, "seconds_left": rounded})

    def on_notice(self, message: str) -> None:
        """{"event": "notice", "message": sentence}"""
        self._write({"event": "notice", "message": message})

    def on_block(self, block: BlockError, layers: Sequence[LayerLoss]) -> None:
        """{"event": "block", "block", "plain", "chosen", "kept", "layers": [{"name", "formula", "plain", "chosen"}]}"""
        lines = [{name: getattr(layer, name) for name in ("name", "formula", "plain", "chosen")} for layer in layers]
        errors = {"plain": block.plain, "chosen": block.chosen, "kept": block.kept}
        self._write({"event": "block", "block": block.name, **errors, "layers": lines})

    def on_done(self, output: str, report: Mapping[str, object]) -> None:
        """{"event": "done", "output": path, "report": {...}}"""
        self._write({"event": "done", "output": output, "report": report})

    def on_failed(self, message: str) -> None:
        """{"event": "failed", "message": sentence}"""
        self._write({"event": "failed", "message": message})

    def _write(self, event: Mapping[str, object]) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressListener]:
    """A bar per phase on the console, with the time left, for as long as the context lasts."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[time_left]}"),
    )
    with Progress(*columns, console=console) as bar:
        tasks = {}

        def listen(phase: str, done: int, total: int, seconds_left: float | None) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total, time_left="")
            bar.update(tasks[phase], completed=done, total=total, time_left=_time_left(seconds_left))

        yield listen


def _time_left(seconds_left: float | None) -> str:
    if seconds_left is None:
        return ""
    minutes, seconds = divmod(round(seconds_left), 60)
    return f"{minutes}:{seconds:02d} left"
