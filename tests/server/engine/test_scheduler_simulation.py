"""Thousands of random arrivals, aborts and preemptions on tiny caches, against what each request gives alone."""

import random
from collections import Counter

import pytest

from server.engine.errors import EngineSetupError
from server.engine.request import FinishReason
from server.engine.scheduler import PREEMPTION_BOUND, SchedulerLimits
from tests.fakes import expected_output
from tests.server.engine.simulation import Simulation, random_request, request, simulation


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
        (10, 40, 4, SchedulerLimits(8, 40, prefill_chunk=8, deterministic=True)),
        (11, 15, 4, SchedulerLimits(8, 24, prefill_chunk=6, deterministic=True)),
    ],
)
def test_whatever_the_batching_each_request_gets_what_it_gets_alone(
    seed: int, num_blocks: int, block_size: int, limits: SchedulerLimits
) -> None:
    rng = random.Random(seed)
    engine = Simulation(num_blocks, block_size, limits)
    arrivals = [random_request(rng, f"r{index}") for index in range(350)]
    aborted: set[str] = set()
    pending = list(reversed(arrivals))
    while pending or engine.loop.has_work:
        while pending and rng.random() < 0.4:
            engine.loop.submit(pending.pop())
        if rng.random() < 0.08:
            target = rng.choice(arrivals).request_id
            is_under_way = target not in {one.request_id for one in pending} and not engine.finish_reasons(target)
            aborted |= {target} if is_under_way else set()
            engine.loop.abort(target)
        engine.loop.step()
        engine.loop.check_integrity()

    assert engine.pool.num_free == num_blocks
    assert max(Counter(engine.started).values()) == 1
    assert max(engine.runner.num_tokens_per_step) <= limits.max_num_batched_tokens
    for arrival in arrivals:
        reasons = engine.finish_reasons(arrival.request_id)
        assert len(reasons) == 1
        assert engine.events[arrival.request_id][-1].finish_reason is not None
        expected = expected_output(arrival)
        output = engine.output(arrival.request_id)
        if arrival.request_id in aborted:
            assert reasons == [FinishReason.ABORTED]
            assert output == expected[: len(output)]
            continue
        assert output == expected
        is_stop = expected[-1] in arrival.sampling.stop_token_ids and len(expected) > arrival.sampling.min_tokens
        assert reasons == [FinishReason.STOP if is_stop else FinishReason.LENGTH]
        scores = engine.events[arrival.request_id][0].prompt_logprobs
        if arrival.sampling.prompt_logprobs is None:
            assert scores == ()
        else:
            assert scores[0] is None
            assert tuple(score.token_id for score in scores[1:] if score) == arrival.prompt_token_ids[1:]


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
    engine = simulation(num_blocks=80, max_num_seqs=4, budget=11, chunk=8)
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
