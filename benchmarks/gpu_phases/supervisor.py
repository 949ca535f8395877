"""Starts the process that runs the phases, writes down what it says at once, and starts another when it dies.

It imports no torch: a fault of the device, of the driver or of a library cannot take the figures with it.
"""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.gpu_phases.protocol import PREPARATION, Message, Request
from benchmarks.gpu_phases.record import Record

ROOT = Path(__file__).resolve().parents[2]
# after so many the machine is at fault, and no figure would come of another
MAX_PROCESSES = 8
# an item that says nothing for so long hangs; the interpreter on a busy machine is slow
SILENT_SECONDS = {True: 300.0, False: 120.0}
EXIT_SECONDS = 5.0


@dataclass(frozen=True)
class Watch:
    """command: what runs the phases. deadline: of all, on the monotonic clock. save: called after every message.

    grace_seconds: what a process that knows the deadline gets beyond it, to come to the end of a figure.
    """

    command: Sequence[str]
    deadline: float
    is_rehearsal: bool
    say: Callable[[str], None]
    save: Callable[[], None]
    grace_seconds: float = 20.0


def run_all(record: Record, watch: Watch) -> None:
    """Run the record's phases to their end, or to the deadline. Interrupted, it leaves no process behind."""
    started = time.monotonic()
    first_item = 0
    while record.unfinished() and record.num_processes < MAX_PROCESSES:
        record.num_processes += 1
        end = _run_process(record, watch, first_item)
        record.seconds = time.monotonic() - started
        if end is None:
            break
        first_item = _note_death(record, end, is_late=time.monotonic() >= watch.deadline)
        watch.say(f"the process that ran the phases is gone: {end.splitlines()[-1]}")
        watch.save()
        if time.monotonic() >= watch.deadline:
            break
    record.state = "out of time" if record.unfinished() else "complete"
    record.seconds = time.monotonic() - started
    watch.save()


def _run_process(record: Record, watch: Watch, first_item: int) -> str | None:
    """Run one process; None when it came to its end, else why it did not."""
    request: Request = {
        "phases": record.unfinished(),
        "first_item": first_item,
        "deadline": watch.deadline,
        "rehearsal": watch.is_rehearsal,
        "figures": record.figures(),
    }
    process = subprocess.Popen(
        watch.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # it stays open: its end tells the process that nobody waits for figures any more
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        why = _listen(process.stdout, record, watch)
    except BrokenPipeError:
        why = "it ended before it read what to do"
    except KeyboardInterrupt:
        process.kill()
        raise
    finally:
        code = _end(process)
    if why is None and record.unfinished():
        why = f"it ended with code {code}"
    return why


def _end(process: subprocess.Popen[str]) -> int:
    """The exit code of a process that is coming to its end; of one that hangs or has more to do, it is the end."""
    try:
        return process.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _environment() -> dict[str, str]:
    """Ours, but whether kernels are interpreted is the process's own choice."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _listen(output: IO[str], record: Record, watch: Watch) -> str | None:
    """Take messages until there are no more; then None, or why nobody waits for them."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(output, lines), daemon=True).start()
    phase_started = time.monotonic()
    broken: str | None = None
    while True:
        limit = SILENT_SECONDS[watch.is_rehearsal or record.is_rehearsal]
        until_end = watch.deadline + watch.grace_seconds - time.monotonic()
        if until_end <= 0:
            return "out of time: it did not stop at the deadline"
        try:
            line = lines.get(timeout=min(limit, until_end))
        except queue.Empty:
            if until_end <= limit:
                return "out of time: it did not stop at the deadline"
            return f"it said nothing for {limit:.0f} s"
        if line is None or not line.endswith("\n"):
            # the end, perhaps in the middle of a word
            return broken
        message: Message = json.loads(line)
        if message["kind"] == "start":
            phase_started = time.monotonic()
        if message["kind"] == "broken":
            broken = message["traceback"]
        record.take(message)
        if "phase" in message:
            record.phases[message["phase"]]["seconds"] += time.monotonic() - phase_started
            phase_started = time.monotonic()
        _tell(message, watch.say)
        watch.save()


def _read_lines(output: IO[str], lines: "queue.SimpleQueue[str | None]") -> None:
    for line in output:
        lines.put(line)
    lines.put(None)


def _tell(message: Message, say: Callable[[str], None]) -> None:
    """A line of progress."""
    kind = message["kind"]
    if kind == "ready":
        what = "a rehearsal with tiny sizes: times mean nothing" if message["rehearsal"] else "the real thing"
        say(f"on {message['device']}: {what}")
    elif kind == "start":
        say(f"phase {message['phase']}")
    elif kind == "item":
        say(f"  {message['index'] + 1:3}/{message['count']} {message['item']}")
    elif kind == "failed":
        say(f"      FAILED: {message['item']}: {message['traceback'].strip().splitlines()[-1]}")
    elif kind == "skipped":
        say(f"      skipped: {len(message['items'])} from {message['items'][0]} on: {message['why']}")


def _note_death(record: Record, why: str, *, is_late: bool) -> int:
    """Record the item that was under way as failed, or as skipped when its time was over.

    Returns the item that the next process begins with. Where none had begun, the phase cannot be run, and is over.
    """
    name, index, item = record.last_item or (record.unfinished()[0], -1, PREPARATION)
    phase = record.phases[name]
    if is_late:
        phase["skips"].append({"items": [item], "why": why})
    elif not phase["failures"] or phase["failures"][-1]["item"] != item:
        phase["failures"].append({"item": item, "traceback": why})
    if record.last_item is None and not is_late:
        phase["state"] = "ended"
    record.last_item = None
    return index + 1
