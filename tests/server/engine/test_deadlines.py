"""A request that is not done when its time is over ends there, wherever it stands, and says so once."""

from dataclasses import replace

import pytest

from server.engine.request import FinishReason
from tests.fakes import expected_output
from tests.server.engine.simulation import request, simulation


@pytest.mark.parametrize("steps_before", [0, 1, 4])
def test_a_request_ends_when_its_time_is_over(steps_before: int) -> None:
    engine = simulation()
    engine.loop.submit(replace(request("late", num_prompt=5, max_tokens=50), deadline=10.0))
    for _ in range(steps_before):
        engine.loop.step()
    engine.now = 10.0
    engine.loop.step()
    # then it has what it was given until then, and its blocks are free
    last = engine.events["late"][-1]
    assert last.finish_reason is FinishReason.TIMEOUT
    assert last.error == f"the time for this request was over after {steps_before} of up to 50 tokens"
    assert engine.output("late") == expected_output(request("", 5, 50))[:steps_before]
    assert engine.pool.num_free == engine.num_blocks
    assert not engine.loop.has_work
    engine.loop.step()
    assert engine.finish_reasons("late") == [FinishReason.TIMEOUT]


def test_a_request_that_is_done_in_time_is_not_touched() -> None:
    engine = simulation()
    engine.loop.submit(replace(request("r", max_tokens=3), deadline=10.0))
    engine.now = 9.9
    engine.run_to_end()
    engine.now = 11.0
    engine.loop.step()
    assert engine.finish_reasons("r") == [FinishReason.LENGTH]


def test_only_those_whose_time_is_over_end() -> None:
    engine = simulation()
    for name, deadline in (("first", 1.0), ("second", 2.0), ("third", 3.0), ("never", None)):
        engine.loop.submit(replace(request(name, max_tokens=20), deadline=deadline))
    for now, expected in ((0.5, []), (1.5, ["first"]), (2.0, ["first", "second"])):
        engine.now = now
        engine.loop.step()
        assert engine.ended == expected
    engine.run_to_end()
    assert engine.output("third") == expected_output(request("", max_tokens=20))
    assert engine.output("never") == expected_output(request("", max_tokens=20))


def test_a_request_that_waits_for_its_turn_ends_in_time_too() -> None:
    engine = simulation(max_num_seqs=1)
    engine.loop.submit(request("long", max_tokens=50))
    engine.loop.submit(replace(request("waits"), deadline=5.0))
    engine.loop.step()
    engine.now = 5.0
    engine.loop.step()
    assert engine.finish_reasons("waits") == [FinishReason.TIMEOUT]
    assert "waits" not in engine.started
    engine.run_to_end()
    assert engine.output("long") == expected_output(request("", max_tokens=50))
