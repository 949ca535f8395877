"""What runs the phases: an item that fails is recorded and the next one runs; what there is no time for is named."""

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu_phases.bench import Bench, Item, NotAvailableError
from benchmarks.gpu_phases.figures import Figure
from benchmarks.gpu_phases.phases import Phase
from benchmarks.gpu_phases.protocol import Message
from benchmarks.gpu_phases.worker import run_items, run_phase


def measuring(name: str) -> Item:
    return Item(name, lambda: [Figure("table", name, {"us": 1.0})])


def failing(name: str) -> Item:
    def run() -> Iterator[Figure]:
        yield Figure("table", f"before {name}", {})
        torch.empty(2) + torch.empty(3)

    return Item(name, run)


def not_available(name: str) -> Item:
    def run() -> Iterator[Figure]:
        raise NotAvailableError("there is no such package")
        yield

    return Item(name, run)


def run(bench: Bench, items: list[Item], *, first_item: int = 0, seconds: float = 60) -> list[Message]:
    messages: list[Message] = []
    run_items("linear", items, bench, messages.append, first_item=first_item, until=time.monotonic() + seconds)
    return messages


def figures(messages: list[Message]) -> list[str]:
    return [message["figure"]["name"] for message in messages if message["kind"] == "figure"]


def test_a_failing_item_keeps_its_figures_and_does_not_stop_the_next(bench: Bench) -> None:
    messages = run(bench, [failing("a"), measuring("b")])

    assert figures(messages) == ["before a", "b"]
    (failure,) = (message for message in messages if message["kind"] == "failed")
    assert failure["item"] == "a"
    assert "must match" in failure["traceback"].splitlines()[-1]


def test_later_items_find_what_earlier_ones_measured(bench: Bench) -> None:
    run(bench, [measuring("a"), measuring("b")])

    assert [figure.name for figure in bench.findings.of("linear")] == ["a", "b"]


def test_what_cannot_be_measured_here_is_skipped_with_the_reason(bench: Bench) -> None:
    messages = run(bench, [not_available("a"), measuring("b")])

    assert {"kind": "skipped", "phase": "linear", "items": ["a"], "why": "there is no such package"} in messages
    assert figures(messages) == ["b"]


def test_items_for_which_there_is_no_time_are_named(bench: Bench) -> None:
    messages = run(bench, [measuring("a"), measuring("b")], seconds=-1)

    assert messages == [{"kind": "skipped", "phase": "linear", "items": ["a", "b"], "why": "out of time"}]


def test_an_item_is_left_when_its_time_is_over(bench: Bench) -> None:
    def slow() -> Iterator[Figure]:
        yield Figure("table", "first", {})
        while time.monotonic() < until:
            pass
        yield Figure("table", "second", {})
        yield Figure("table", "third", {})

    until = time.monotonic() + 0.2
    messages: list[Message] = []
    run_items("linear", [Item("a", slow), measuring("b")], bench, messages.append, first_item=0, until=until)

    assert figures(messages) == ["first", "second"]
    assert [message["items"] for message in messages if message["kind"] == "skipped"] == [["rest of a"], ["b"]]


def test_a_process_that_follows_another_begins_where_it_is_told(bench: Bench) -> None:
    assert figures(run(bench, [measuring("a"), measuring("b"), measuring("c")], first_item=1)) == ["b", "c"]


def test_a_phase_that_cannot_be_prepared_is_one_failure(bench: Bench) -> None:
    messages: list[Message] = []

    run_phase(Phase("absent", "Absent", 1), bench, messages.append, first_item=0, until=time.monotonic() + 60)

    assert [message["kind"] for message in messages] == ["failed"]
    assert "No module named 'benchmarks.gpu_phases.absent'" in messages[0]["traceback"]
