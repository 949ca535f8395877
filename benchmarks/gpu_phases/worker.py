"""Runs phases in a process of its own: python -m benchmarks.gpu_phases.worker, a request on standard input.

A GPU that met an illegal access is of no use to its process any more, and some faults end it: another one goes on with
the next item then. Messages go to standard output; what libraries print there goes to standard error.
"""

import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TextIO

import torch

from benchmarks.gpu_phases.bench import Bench, Item, NotAvailableError
from benchmarks.gpu_phases.figures import Figure, Findings
from benchmarks.gpu_phases.phases import PHASE_OF, Phase, seconds_for
from benchmarks.gpu_phases.protocol import PREPARATION, Message, Request
from benchmarks.gpu_phases.sizes import FULL, REHEARSAL
from benchmarks.gpu_phases.stopwatch import make_stopwatch

Send = Callable[[Message], None]
Plan = Callable[[Bench], Sequence[Item]]
OUT_OF_TIME = "out of time"
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


class BrokenDeviceError(Exception):
    """The device answers nothing but errors."""


def main() -> int:
    messages = _claim_output()

    def send(message: Message) -> None:
        messages.write(json.dumps(message, allow_nan=False) + "\n")
        messages.flush()

    request: Request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    is_rehearsal = request["rehearsal"] or not torch.cuda.is_available()
    if is_rehearsal:
        # before anything imports triton
        os.environ["TRITON_INTERPRET"] = "1"
    bench = make_bench(request, is_rehearsal=is_rehearsal)
    from benchmarks.gpu_phases.machine import device_name

    send({"kind": "ready", "device": device_name(bench.device), "rehearsal": is_rehearsal})
    try:
        run_phases(request, bench, send)
    except (BrokenDeviceError, BrokenPipeError):
        # said already, or nobody is there to hear it
        return 1
    return 0


def make_bench(request: Request, *, is_rehearsal: bool) -> Bench:
    torch.set_grad_enabled(False)
    # references are to be exact
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cpu" if is_rehearsal else "cuda")
    findings = Findings()
    for phase, figures in request["figures"].items():
        for figure in figures:
            findings.add(phase, Figure.from_json(figure))
    return Bench(device, REHEARSAL if is_rehearsal else FULL, make_stopwatch(device), findings)


def run_phases(request: Request, bench: Bench, send: Send) -> None:
    """Each phase within its share of the time that is left. Raises BrokenDeviceError after it has said so."""
    phases = tuple(PHASE_OF[name] for name in request["phases"])
    for position, phase in enumerate(phases):
        seconds_left = max(request["deadline"] - time.monotonic(), 0.0)
        until = time.monotonic() + seconds_for(phase, phases[position + 1 :], seconds_left)
        send({"kind": "start", "phase": phase.name})
        run_phase(phase, bench, send, first_item=request["first_item"] if position == 0 else 0, until=until)
        _release(bench)
        send({"kind": "end", "phase": phase.name, "clocks": _clocks(bench)})


def run_phase(phase: Phase, bench: Bench, send: Send, *, first_item: int, until: float) -> None:
    """The phase's items from that one on, as long as there is time; one that fails doesn't stop the next."""
    try:
        plan: Plan = importlib.import_module(phase.module).plan
        items = plan(bench)
    except Exception:
        # whatever it is, the other phases go on
        send({"kind": "failed", "phase": phase.name, "item": PREPARATION, "traceback": traceback.format_exc()})
        return
    run_items(phase.name, items, bench, send, first_item=first_item, until=until)


def run_items(
    phase_name: str, items: Sequence[Item], bench: Bench, send: Send, *, first_item: int, until: float
) -> None:
    """One after the other; what there is no time for is named."""
    for index, item in enumerate(items):
        if index < first_item:
            continue
        if time.monotonic() >= until:
            names = [left.name for left in items[index:]]
            send({"kind": "skipped", "phase": phase_name, "items": names, "why": OUT_OF_TIME})
            return
        send({"kind": "item", "phase": phase_name, "item": item.name, "index": index, "count": len(items)})
        _run_item(phase_name, item, bench, send, until=until)
        _release(bench)


def _run_item(phase_name: str, item: Item, bench: Bench, send: Send, *, until: float) -> None:
    try:
        for figure in item.run():
            bench.findings.add(phase_name, figure)
            send({"kind": "figure", "phase": phase_name, "figure": figure.to_json()})
            if time.monotonic() >= until:
                send({"kind": "skipped", "phase": phase_name, "items": [f"rest of {item.name}"], "why": OUT_OF_TIME})
                break
    except NotAvailableError as error:
        send({"kind": "skipped", "phase": phase_name, "items": [item.name], "why": str(error)})
    except BrokenPipeError:
        # nobody listens any more
        raise
    except Exception:
        # any failure at all is one of this item, recorded as such
        send({"kind": "failed", "phase": phase_name, "item": item.name, "traceback": traceback.format_exc()})
        _check_device(bench, send)


def _check_device(bench: Bench, send: Send) -> None:
    try:
        bench.stopwatch.wait()
        torch.zeros(1, device=bench.device).item()
    except RuntimeError as error:
        send({"kind": "broken", "traceback": traceback.format_exc()})
        raise BrokenDeviceError from error


def _release(bench: Bench) -> None:
    """Give back what an item or a phase held: the next one may need all of the memory."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _clocks(bench: Bench) -> dict[str, str]:
    from benchmarks.gpu_phases.machine import ask_nvidia_smi

    return ask_nvidia_smi(CLOCK_FIELDS) if bench.device.type == "cuda" else {}


def _end_with_parent() -> None:
    """Standard input ends with the process at its other end, however that ends: then nobody wants what is measured."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _claim_output() -> TextIO:
    """Standard output for messages alone; from here on others who write to it write to standard error."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return messages


if __name__ == "__main__":
    sys.exit(main())
