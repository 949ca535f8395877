"""What one request computed is read by others that begin alike, and by nobody else."""

import random

import pytest

from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits
from tests.fakes import RecordingRunner, expected_output
from tests.server.engine.simulation import Simulation, random_request, request, simulation


def alone_spans(arrival: GenerationRequest, num_tokens: int, chunk: int) -> list[tuple[int, int]]:
    """How each of the first tokens of a request is computed when it runs alone: prompts in chunks, output singly."""
    num_prompt = len(arrival.prompt_token_ids)
    return [
        (position - position % chunk, min(position - position % chunk + chunk, num_prompt))
        if position < num_prompt
        else (position, position + 1)
        for position in range(num_tokens)
    ]


@pytest.mark.parametrize(("num_blocks", "chunk"), [(15, 8), (20, 6), (200, 16)])
def test_a_deterministic_engine_reads_only_what_the_request_alone_would_have_computed(
    num_blocks: int, chunk: int
) -> None:
    rng = random.Random(num_blocks)
    engine = Simulation(num_blocks, 4, SchedulerLimits(8, 40, prefill_chunk=chunk, deterministic=True), RecordingRunner)
    # given requests that share beginnings, in a cache that preempts them or holds them all
    arrivals = [random_request(rng, f"r{index}") for index in range(200)]
    for arrival in arrivals:
        engine.loop.submit(arrival)
        engine.loop.step()
    engine.run_to_end()
    for arrival in arrivals:
        assert isinstance(engine.runner, RecordingRunner)
        spans = engine.runner.spans_read[arrival.request_id]
        assert spans == alone_spans(arrival, len(spans), chunk)
    if num_blocks == 200:
        assert engine.scheduler.stats().cached_prompt_tokens > 0


def test_a_prompt_that_begins_as_an_earlier_one_is_computed_from_where_they_part() -> None:
    engine = simulation(num_blocks=40)
    common = tuple(range(20))
    engine.loop.submit(GenerationRequest("first", (*common, 900), SamplingParams(max_tokens=2)))
    engine.run_to_end()
    second = GenerationRequest("second", (*common, 901, 902), SamplingParams(max_tokens=2))
    engine.loop.submit(second)
    engine.run_to_end()
    # then the five full blocks of four are read, and two tokens are left
    assert engine.runner.num_tokens_per_step[-2] == 2
    assert [event.num_cached_tokens for event in engine.events["second"]] == [20, 0]
    assert engine.events["first"][0].num_cached_tokens == 0
    assert engine.output("second") == expected_output(second)
    assert engine.scheduler.stats().cached_prompt_tokens == 20


def test_an_answer_is_a_beginning_too() -> None:
    engine = simulation(num_blocks=40)
    engine.loop.submit(request("turn 1", num_prompt=9, max_tokens=8))
    engine.run_to_end()
    history = (*request("", 9, 8).prompt_token_ids, *engine.output("turn 1"))
    engine.loop.submit(GenerationRequest("turn 2", (*history, 7), SamplingParams(max_tokens=1)))
    engine.run_to_end()
    # then of 18 tokens the four full blocks were computed before: the last token of an answer never is
    assert engine.events["turn 2"][0].num_cached_tokens == 16


def test_choices_that_start_in_one_step_share_their_prompt() -> None:
    engine = simulation(num_blocks=40, budget=40)
    for index in range(3):
        engine.loop.submit(GenerationRequest(f"choice {index}", tuple(range(17)), SamplingParams(max_tokens=3)))
    engine.loop.step()
    # 17 tokens of the first, and what follows the four full blocks of each other
    assert engine.runner.num_tokens_per_step == [17 + 1 + 1]
    assert engine.pool.num_free == 40 - 5 - 1 - 1
    engine.run_to_end()


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    engine = simulation(num_blocks=40)
    for name in ("first", "again"):
        engine.loop.submit(request(name, num_prompt=16, max_tokens=2))
        engine.run_to_end()
    assert engine.events["again"][0].num_cached_tokens == 12
    assert engine.output("again") == engine.output("first")


def test_tenants_share_nothing() -> None:
    engine = simulation(num_blocks=40)
    for salt in ("one", "other"):
        engine.loop.submit(GenerationRequest(salt, tuple(range(20)), SamplingParams(max_tokens=2), cache_salt=salt))
        engine.run_to_end()
    assert engine.scheduler.stats().cached_prompt_tokens == 0


def test_what_a_failed_request_computed_is_read_by_nobody() -> None:
    engine = simulation(num_blocks=40)
    engine.runner.failing_request_ids.add("sick")
    for name in ("sick", "well"):
        engine.loop.submit(request(name, num_prompt=17, max_tokens=2))
        engine.run_to_end()
    assert engine.events["well"][0].num_cached_tokens == 0


def test_a_preempted_request_goes_on_from_what_is_left_of_it() -> None:
    engine = simulation(num_blocks=16)
    for index in range(8):
        engine.loop.submit(request(f"r{index}", num_prompt=3 + index, max_tokens=45))
    engine.run_to_end()
    num_known = sum(3 + index + 45 - 1 for index in range(8))
    # then less was computed twice than all of what the preempted knew
    assert engine.scheduler.stats().num_preemptions > 0
    with_cache = sum(engine.runner.num_tokens_per_step)
    assert with_cache >= num_known

    plain = Simulation(16, 4, SchedulerLimits(8, 24, prefix_caching=False))
    for index in range(8):
        plain.loop.submit(request(f"r{index}", num_prompt=3 + index, max_tokens=45))
    plain.run_to_end()
    assert with_cache < sum(plain.runner.num_tokens_per_step)


def copying_simulation() -> Simulation:
    return Simulation(40, 4, SchedulerLimits(8, 24, copies_blocks=True))


@pytest.mark.parametrize("num_prompt", [16, 17, 18, 19, 3])
def test_of_a_prompt_that_comes_again_only_the_last_token_is_computed(num_prompt: int) -> None:
    # given prompts that end at the end of a block and inside of one
    engine = copying_simulation()
    for name in ("first", "again"):
        engine.loop.submit(request(name, num_prompt, max_tokens=3))
        engine.run_to_end()
    assert engine.events["again"][0].num_cached_tokens == num_prompt - 1
    assert engine.runner.num_tokens_per_step[-3:] == [1, 1, 1]
    assert engine.output("again") == engine.output("first")


def test_a_conversation_goes_on_inside_of_a_block() -> None:
    engine = copying_simulation()
    engine.loop.submit(request("turn 1", num_prompt=9, max_tokens=8))
    engine.run_to_end()
    history = (*request("", 9, 8).prompt_token_ids, *engine.output("turn 1"))
    second = GenerationRequest("turn 2", (*history, 7), SamplingParams(max_tokens=2))
    engine.loop.submit(second)
    engine.run_to_end()
    # then of 18 tokens 16 were computed: the last token of an answer never is
    assert engine.events["turn 2"][0].num_cached_tokens == 16
    assert engine.output("turn 2") == expected_output(second)


def test_prompts_that_part_inside_of_a_block_share_what_stands_before() -> None:
    engine = copying_simulation()
    engine.loop.submit(GenerationRequest("first", (*range(18), 900, 901), SamplingParams(max_tokens=2)))
    engine.run_to_end()
    second = GenerationRequest("second", (*range(18), 902, 903), SamplingParams(max_tokens=2))
    engine.loop.submit(second)
    engine.run_to_end()
    assert engine.events["second"][0].num_cached_tokens == 18
    assert engine.output("second") == expected_output(second)


def test_a_part_of_a_block_is_no_other_tenants_and_no_failed_requests() -> None:
    engine = copying_simulation()
    engine.runner.failing_request_ids.add("sick")
    for name, salt in (("sick", ""), ("well", ""), ("stranger", "salt")):
        prompt = request(name, num_prompt=6).prompt_token_ids
        engine.loop.submit(GenerationRequest(name, prompt, SamplingParams(max_tokens=2), cache_salt=salt))
        engine.run_to_end()
        assert engine.events[name][0].num_cached_tokens == 0


def test_a_step_that_failed_copied_nothing_that_counts() -> None:
    # given prompts that are to be copied, in a step that the device has no memory for
    engine = copying_simulation()
    engine.loop.submit(request("first", num_prompt=19, max_tokens=3))
    engine.run_to_end()
    engine.runner.memory_tokens = 1
    for name in ("again", "and again"):
        engine.loop.submit(request(name, num_prompt=19, max_tokens=3))
    engine.run_to_end()
    assert engine.scheduler.stats().num_out_of_memory > 0
    for name in ("again", "and again"):
        assert engine.output(name) == engine.output("first")


def test_the_last_of_several_ends_after_one_beginning_is_known() -> None:
    # given two prompts that part in their first block, by turns
    engine = copying_simulation()
    cached = []
    for number, first in enumerate((0, 0, 1, 0, 0, 1, 1)):
        prompt = (9, first, 8)
        engine.loop.submit(GenerationRequest(str(number), prompt, SamplingParams(max_tokens=1)))
        engine.run_to_end()
        cached.append(engine.events[str(number)][0].num_cached_tokens)
    assert cached == [0, 2, 1, 1, 2, 1, 2]


def test_ends_of_short_prompts_do_not_push_out_a_long_beginning() -> None:
    # given a cache of which a long prompt takes a third, and many short ones after one another that fill no block
    engine = copying_simulation()
    long = tuple(range(52))
    engine.loop.submit(GenerationRequest("long", long, SamplingParams(max_tokens=1)))
    engine.run_to_end()
    for number in range(60):
        engine.loop.submit(GenerationRequest(f"short {number}", (900 - number, 5), SamplingParams(max_tokens=1)))
        engine.run_to_end()
    engine.loop.submit(GenerationRequest("again", long, SamplingParams(max_tokens=1)))
    engine.run_to_end()
    assert engine.events["again"][0].num_cached_tokens == 51
