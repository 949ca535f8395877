"""The process that runs the phases may die, break its device or hang: what was found stays, and the rest is run."""

import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.gpu_phases.phases import PHASES
from benchmarks.gpu_phases.record import Record
from benchmarks.gpu_phases.supervisor import MAX_PROCESSES, Watch, run_all

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
READY = {"kind": "ready", "device": "a fake", "rehearsal": False}
KILLED = {"die": int(signal.SIGKILL)}


def start(phase: str) -> dict[str, object]:
    return {"kind": "start", "phase": phase}


def item(phase: str, index: int) -> dict[str, object]:
    return {"kind": "item", "phase": phase, "item": f"item {index}", "index": index, "count": 3}


def figure(phase: str, name: str) -> dict[str, object]:
    found = {"table": "table", "name": name, "values": {"us": 1.5}, "goals": []}
    return {"kind": "figure", "phase": phase, "figure": found}


def end(phase: str) -> dict[str, object]:
    return {"kind": "end", "phase": phase, "clocks": {}}


def whole(phase: str) -> list[dict[str, object]]:
    return [start(phase), item(phase, 0), figure(phase, f"of {phase}"), end(phase)]


@dataclass
class Run:
    """What became of a run whose processes did as they were told."""

    record: Record
    script: Path
    saved: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def requests(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.script.with_suffix(".requests").read_text().splitlines()]


def supervise(
    directory: Path, processes: list[list[dict[str, object]]], *, phases: list[str], seconds: float = 60
) -> Run:
    script = directory / "script.json"
    script.write_text(json.dumps(processes))
    run = Run(Record.of("a command", "a moment", phases), script)
    watch = Watch(
        command=(sys.executable, str(FAKE_WORKER), str(script)),
        deadline=time.monotonic() + seconds,
        is_rehearsal=False,
        say=run.said.append,
        save=lambda: run.saved.append(json.dumps(run.record.to_json())),
        grace_seconds=0.0,
    )
    run_all(run.record, watch)
    return run


def names(run: Run, phase: str) -> list[str]:
    return [found["name"] for found in run.record.phases[phase]["figures"]]


def test_a_run_without_faults_is_one_process(tmp_path: Path) -> None:
    run = supervise(tmp_path, [[READY, *whole("machine"), *whole("linear")]], phases=["machine", "linear"])

    assert (run.record.state, run.record.num_processes, run.record.num_failures) == ("complete", 1, 0)
    assert (run.record.device, names(run, "machine"), names(run, "linear")) == ("a fake", ["of machine"], ["of linear"])


def test_after_a_death_another_process_goes_on_with_the_next_item(tmp_path: Path) -> None:
    # given a process that is killed in the second item of the first phase, in the middle of a message
    torn = {"torn": True}
    first = [READY, start("linear"), item("linear", 0), figure("linear", "kept"), item("linear", 1), torn, KILLED]
    second = [READY, start("linear"), item("linear", 2), figure("linear", "later"), end("linear"), *whole("tune")]

    run = supervise(tmp_path, [first, second], phases=["linear", "tune"])

    # then the item is recorded, what was found before is handed on, and everything else is run
    assert [failure["item"] for failure in run.record.phases["linear"]["failures"]] == ["item 1"]
    assert "-9" in run.record.phases["linear"]["failures"][0]["traceback"]
    assert (names(run, "linear"), names(run, "tune")) == (["kept", "later"], ["of tune"])
    assert run.requests()[1]["first_item"] == 2
    assert [found["name"] for found in run.requests()[1]["figures"]["linear"]] == ["kept"]
    assert run.record.state == "complete"


def test_a_broken_device_is_one_failure_of_one_item(tmp_path: Path) -> None:
    failed = {"kind": "failed", "phase": "linear", "item": "item 0", "traceback": "RuntimeError: an illegal access"}
    broken = {"kind": "broken", "traceback": "RuntimeError: an illegal access"}

    run = supervise(
        tmp_path,
        [[READY, start("linear"), item("linear", 0), failed, broken], [READY, start("linear"), end("linear")]],
        phases=["linear"],
    )

    assert run.record.phases["linear"]["failures"] == [{"item": "item 0", "traceback": failed["traceback"]}]
    assert run.requests()[1]["first_item"] == 1


def test_a_process_that_cannot_start_ends_every_phase_with_the_reason(tmp_path: Path) -> None:
    phases = [phase.name for phase in PHASES]

    run = supervise(tmp_path, [[KILLED]] * MAX_PROCESSES, phases=phases)

    assert run.record.state == "complete"
    assert [len(run.record.phases[name]["failures"]) for name in phases] == [1] * len(phases)


def test_a_process_that_hangs_at_the_deadline_is_ended_and_nothing_failed(tmp_path: Path) -> None:
    hanging = [READY, start("machine"), item("machine", 0), figure("machine", "kept"), {"hang": True}]

    run = supervise(tmp_path, [hanging], phases=["machine", "linear"], seconds=1.0)

    assert (run.record.state, run.record.num_failures, names(run, "machine")) == ("out of time", 0, ["kept"])
    assert run.record.phases["machine"]["skips"][0]["items"] == ["item 0"]


def test_every_message_is_on_the_disk_before_the_next(tmp_path: Path) -> None:
    run = supervise(tmp_path, [[READY, *whole("machine"), *whole("linear")]], phases=["machine", "linear"])

    numbers = [sum(len(phase["figures"]) for phase in json.loads(saved)["phases"].values()) for saved in run.saved]
    assert numbers == sorted(numbers)
    assert {0, 1, 2} == set(numbers)


@pytest.mark.parametrize("message", [{"kind": "skipped", "phase": "linear", "items": ["a", "b"], "why": "out of time"}])
def test_what_is_skipped_is_told(tmp_path: Path, message: dict[str, object]) -> None:
    run = supervise(tmp_path, [[READY, start("linear"), message, end("linear")]], phases=["linear"])

    assert run.record.phases["linear"]["skips"] == [{"items": ["a", "b"], "why": "out of time"}]
    assert any("skipped: 2 from a on: out of time" in line for line in run.said)
