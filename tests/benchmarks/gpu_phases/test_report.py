"""From the record to the page: goals met and missed, what failed, what was skipped; and JSON that any reader takes."""

import json
import math

from benchmarks.gpu_phases.figures import Figure, Goal
from benchmarks.gpu_phases.record import Record
from benchmarks.gpu_phases.report import render


def record_with(*figures: Figure) -> Record:
    record = Record.of("python benchmarks/gpu.py", "today", ["linear", "tune"])
    record.take({"kind": "ready", "device": "NVIDIA H100", "rehearsal": False})
    record.take({"kind": "start", "phase": "linear"})
    for figure in figures:
        record.take({"kind": "figure", "phase": "linear", "figure": figure.to_json()})
    return record


def lines_with(page: str, text: str) -> list[str]:
    return [line for line in page.splitlines() if text in line]


def test_a_goal_says_whether_it_is_met_and_by_how_many() -> None:
    page = render(
        record_with(
            Figure("Linear", "qkv", {"rows": 1, "us": 4.5}, (Goal("share", 0.80, 0.75),)),
            Figure("Linear", "down", {"rows": 1, "us": 9.0}, (Goal("share", 0.50, 0.75),)),
        )
    )

    assert lines_with(page, "| qkv | 1 | 4.5 |") == ["| qkv | 1 | 4.5 | met (0.80 of 0.75) |"]
    assert lines_with(page, "| down | 1 | 9 |") == ["| down | 1 | 9 | MISSED (0.50 of 0.75) |"]
    assert lines_with(page, "linear: share") == ["| linear: share | 1 of 2 | 0.75 | 0.500: down, 1 rows |"]


def test_rows_without_a_column_leave_it_empty() -> None:
    page = render(record_with(Figure("Linear", "a", {"us": 1.0}), Figure("Linear", "b", {"GB/s": 2000.0, "us": None})))

    assert lines_with(page, "| a |") == ["| a | 1 |  |"]
    assert lines_with(page, "| b |") == ["| b |  | 2000 |"]


def test_failures_and_skips_are_told_with_their_reasons() -> None:
    record = record_with()
    record.take({"kind": "failed", "phase": "linear", "item": "qkv", "traceback": "Traceback:\n  a\nOSError: no"})
    record.take({"kind": "skipped", "phase": "linear", "items": list("abcdef"), "why": "out of time"})

    page = render(record)

    assert lines_with(page, "OSError") == ["- linear, qkv: `OSError: no`"]
    assert lines_with(page, "- skipped") == ["- skipped, out of time: a, b, c, d and 2 more"]
    assert lines_with(page, "| linear |") == ["| linear | running | 0.0 | 0 | 1 | 6 |"]
    assert lines_with(page, "| tune |") == ["| tune | pending | 0.0 | 0 | 0 | 0 |"]


def test_a_rehearsal_says_that_its_times_mean_nothing() -> None:
    record = record_with()
    assert not lines_with(render(record), "rehearsal")

    record.take({"kind": "ready", "device": "a CPU", "rehearsal": True})

    assert lines_with(render(record), "its times mean nothing")


def test_numbers_that_json_does_not_have_become_words() -> None:
    record = record_with(Figure("Linear", "a", {"us": math.nan}, (Goal("share", math.nan, 0.75),)))

    text = json.dumps(record.to_json(), allow_nan=False)

    (figure,) = json.loads(text)["phases"]["linear"]["figures"]
    assert figure["values"] == {"us": "nan"}
    # what is no number meets nothing
    assert figure["goals"] == [{"name": "share", "reached": 0.0, "wanted": 0.75}]
