"""Thousands of random arrivals, aborts and preemptions on tiny caches, against what each request gives alone."""

import random
from collections import Counter

import pytest

from server.engine.errors import EngineSetupError
from server.engine.request import FinishReason
from server.engine.scheduler import PREEMPTION_BOUND, SchedulerLimits
from tests.fakes import RecordingRunner, expected_output
from tests.server.engine.crowd import Journey, serve_crowd
from tests.server.engine.simulation import Simulation, request, simulation

# 12 times as many are 100,000
NUM_REQUESTS = 8_334


@pytest.mark.parametrize(
    ("seed", "num_blocks", "block_size", "limits"),
    [
        (0, 15, 4, SchedulerLimits(8, 24)),  # the cache holds one full request: preemption all the time
        (1, 40, 4, SchedulerLimits(8, 8)),  # a budget of one token a sequence
        (2, 60, 1, SchedulerLimits(16, 64)),  # blocks of one token
        (3, 20, 3, SchedulerLimits(3, 7)),  # sizes that divide nothing
        (4, 300, 16, SchedulerLimits(32, 512)),  # room for all
        (5, 17, 4, SchedulerLimits(16, 100)),
        (6, 15, 4, SchedulerLimits(8, 24, prefill_chunk=17)),  # room for one chunk beside the others
        (7, 40, 4, SchedulerLimits(8, 8, prefill_chunk=1)),
        (8, 300, 16, SchedulerLimits(32, 512, prefill_chunk=16)),
        (9, 40, 4, SchedulerLimits(8, 40, prefix_caching=False)),
        (11, 15, 4, SchedulerLimits(8, 24, copies_blocks=True)),
        (12, 20, 16, SchedulerLimits(16, 100, prefill_chunk=16, copies_blocks=True)),
        (13, 40, 4, SchedulerLimits(8, 40, prefill_chunk=8, deterministic=True)),
        (14, 15, 4, SchedulerLimits(8, 24, prefill_chunk=6, deterministic=True)),
    ],
)
def test_whatever_the_batching_each_request_gets_what_it_gets_alone(
    seed: int, num_blocks: int, block_size: int, limits: SchedulerLimits
) -> None:
    rng = random.Random(seed)
    engine = Simulation(num_blocks, block_size, limits)

    journeys = serve_crowd(engine, rng, NUM_REQUESTS)

    assert engine.pool.num_free == num_blocks
    assert max(Counter(engine.started).values()) == 1
    assert max(engine.runner.num_tokens_per_step) <= limits.max_num_batched_tokens
    stats = engine.scheduler.stats()
    assert stats.num_out_of_memory > 0
    assert (stats.cached_prompt_tokens > 0) == limits.prefix_caching
    assert (stats.num_preemptions > 0) == (num_blocks < 300)
    assert (engine.runner.num_copies > 0) == limits.copies_blocks
    for journey in journeys:
        check_events(engine, journey)
    reasons = Counter(journey.finish_reason for journey in journeys)
    assert all(reasons[reason] > 0 for reason in FinishReason if reason is not FinishReason.ERROR)


def check_events(engine: Simulation, journey: Journey) -> None:
    """One end, told last, at the right time, and until then the tokens that the request gets alone."""
    request, events = journey.request, engine.events[journey.request.request_id]
    assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
    reason, deadline = events[-1].finish_reason, request.deadline
    expected, output = expected_output(request), engine.output(request.request_id)
    if journey.was_aborted:
        assert reason is FinishReason.ABORTED
    elif deadline is not None and journey.ended_at >= deadline:
        # the first step at which it was over, no later
        assert reason is FinishReason.TIMEOUT
        assert journey.ended_at == deadline
    else:
        assert output == expected
        is_stop = expected[-1] in request.sampling.stop_token_ids and len(expected) > request.sampling.min_tokens
        assert reason is (FinishReason.STOP if is_stop else FinishReason.LENGTH)
    assert output == expected[: len(output)]
    if output and request.sampling.prompt_logprobs is not None:
        scores = events[0].prompt_logprobs
        assert scores[0] is None
        assert tuple(score.token_id for score in scores[1:] if score) == request.prompt_token_ids[1:]
    else:
        assert not any(event.prompt_logprobs for event in events)


def test_the_tiny_caches_do_preempt() -> None:
    engine = simulation(num_blocks=16)
    for index in range(8):
        engine.loop.submit(request(f"r{index}", num_prompt=3, max_tokens=50))
    engine.run_to_end()
    assert engine.scheduler.stats().num_preemptions > 0
    assert all(engine.output(f"r{index}") == expected_output(request("", 3, 50)) for index in range(8))


def test_a_sequence_preempted_to_the_bound_is_spared_while_others_can_yield() -> None:
    engine = simulation(num_blocks=16, max_num_seqs=4)
    for index in range(12):
        engine.loop.submit(request(f"r{index}", num_prompt=2 + index, max_tokens=45))
    reached_the_bound = False
    while engine.loop.has_work:
        running = list(engine.scheduler._running)
        before = {sequence: sequence.num_preemptions for sequence in running}
        engine.loop.step()
        for victim in (sequence for sequence in running if sequence.num_preemptions > before[sequence]):
            reached_the_bound |= victim.num_preemptions == PREEMPTION_BOUND
            if before[victim] >= PREEMPTION_BOUND:
                assert all(other.num_preemptions >= PREEMPTION_BOUND for other in engine.scheduler._running)
    assert reached_the_bound


def test_requests_start_in_the_order_they_came() -> None:
    engine = simulation(max_num_seqs=2)
    for index in range(20):
        engine.loop.submit(request(f"r{index:02}"))
    engine.run_to_end()
    assert engine.started == sorted(engine.started)


def test_a_long_prompt_is_computed_in_chunks_beside_the_others() -> None:
    engine = simulation(num_blocks=40, budget=10)
    engine.loop.submit(request("short", num_prompt=4, max_tokens=10))
    engine.loop.step()
    engine.loop.submit(request("long", num_prompt=40, max_tokens=2))
    for _ in range(4):
        engine.loop.step()
    # 1 token of the short one and 9 of the long one a step: 36 of 40 computed, and no step without the short one
    assert len(engine.output("short")) == 5
    assert engine.output("long") == ()
    engine.run_to_end()
    assert engine.output("long") == expected_output(request("", 40, 2))


def test_a_prompt_is_cut_at_the_same_places_whatever_is_beside_it() -> None:
    # given room for one chunk of 8 beside three others, and four prompts that differ in length
    engine = Simulation(80, 4, SchedulerLimits(4, 11, prefill_chunk=8), RecordingRunner)
    assert isinstance(engine.runner, RecordingRunner)
    lengths = (35, 5, 8, 24)
    for length in lengths:
        engine.loop.submit(request(f"r{length}", num_prompt=length, max_tokens=9))
    # when they run together
    engine.run_to_end()
    # then each is cut at multiples of 8, and at the end of its prompt
    for length in lengths:
        cuts = [cut for cut in engine.runner.cuts[f"r{length}"] if cut <= length]
        assert cuts == [*range(8, length, 8), length]
        assert engine.output(f"r{length}") == expected_output(request("", length, 9))


def test_a_prompt_whose_chunk_does_not_fit_is_not_overtaken() -> None:
    engine = simulation(num_blocks=80, max_num_seqs=4, budget=11, chunk=8)
    for name, length in (("first", 20), ("second", 20), ("third", 2)):
        engine.loop.submit(request(name, num_prompt=length, max_tokens=2))
    # when the first one's chunk leaves 3 tokens of the step, enough for the third alone
    engine.loop.step()
    # then the third waits as the second does
    assert engine.started == ["first"]
    engine.run_to_end()
    assert engine.started == ["first", "second", "third"]


def test_whoever_waits_for_a_chunk_is_not_starved_by_those_that_decode() -> None:
    engine = simulation(num_blocks=80, max_num_seqs=4, budget=11, chunk=8)
    # given three that decode for long
    for index in range(3):
        engine.loop.submit(request(f"r{index}", num_prompt=1, max_tokens=50))
    engine.loop.step()
    # when a long prompt comes, each step takes a chunk of it
    engine.loop.submit(request("long", num_prompt=32, max_tokens=1))
    for _ in range(4):
        engine.loop.step()
    assert engine.output("long") == expected_output(request("", 32, 1))


def test_nobody_new_is_admitted_in_a_step_that_preempts() -> None:
    engine = simulation(num_blocks=15, max_num_seqs=4)
    for index in range(4):
        engine.loop.submit(request(f"r{index}", num_prompt=10, max_tokens=40))
    num_steps_that_preempt = 0
    while engine.loop.has_work:
        num_preemptions = engine.scheduler.stats().num_preemptions
        # given somebody new who would fit anywhere
        newcomer = f"late {num_preemptions} {len(engine.started)}"
        engine.loop.submit(request(newcomer, num_prompt=1, max_tokens=1))
        engine.loop.step()
        if engine.scheduler.stats().num_preemptions > num_preemptions:
            num_steps_that_preempt += 1
            assert newcomer not in engine.started
        engine.loop.abort(newcomer)
    assert num_steps_that_preempt > 0


def test_an_abort_returns_the_blocks_before_the_next_step() -> None:
    engine = simulation()
    engine.loop.submit(request("kept"))
    engine.loop.step()
    free = engine.pool.num_free
    engine.loop.submit(request("dropped", num_prompt=17))
    engine.loop.step()
    engine.loop.abort("dropped")
    # the other one may have grown by a block in between
    assert engine.pool.num_free >= free - 1
    assert engine.finish_reasons("dropped") == [FinishReason.ABORTED]
    engine.run_to_end()
    assert engine.output("kept") == expected_output(request("kept"))


def test_aborting_twice_or_after_the_end_says_nothing_more() -> None:
    engine = simulation()
    engine.loop.submit(request("r"))
    engine.run_to_end()
    num_events = len(engine.events["r"])
    engine.loop.abort("r")
    engine.loop.abort("never seen")
    assert len(engine.events["r"]) == num_events
    assert "never seen" not in engine.events


def test_a_row_that_fails_ends_its_request_and_no_other() -> None:
    engine = simulation()
    engine.runner.failing_request_ids.add("sick")
    engine.loop.submit(request("well"))
    engine.loop.submit(request("sick"))
    engine.run_to_end()
    assert engine.events["sick"][-1].finish_reason is FinishReason.ERROR
    assert engine.events["sick"][-1].error == "the model gave no finite logits"
    assert engine.output("well") == expected_output(request("well"))
    assert engine.pool.num_free == engine.num_blocks


def test_a_request_that_could_never_run_ends_with_the_reason() -> None:
    engine = simulation()
    engine.loop.submit(request("huge", num_prompt=50, max_tokens=50))
    assert engine.finish_reasons("huge") == [FinishReason.ERROR]
    error = engine.events["huge"][0].error
    assert error is not None
    assert "100 together" in error
    assert "60 tokens" in error


def test_a_budget_smaller_than_the_batch_is_refused() -> None:
    with pytest.raises(EngineSetupError, match="max_num_batched_tokens is 4, fewer than max_num_seqs 8"):
        SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=4)
