"""Guesses change no token: crowds on tiny caches, with a model that mostly repeats itself, and single rules."""

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from server.engine.block_pool import BlockPool
from server.engine.draft_length import Speculation
from server.engine.request import FinishReason, GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.sequence import Sequence
from server.engine.step_plan import SampledToken, StepPlan, StepResult, TokenIds
from tests.fakes import RepeatingRunner, expected_output, expected_repeating_output
from tests.server.engine.crowd import Journey, serve_crowd
from tests.server.engine.simulation import Simulation, random_request, request

NUM_REQUESTS = 200
# rows that cost nothing are always worth it
CHEAP = Speculation(num_tokens=5, row_cost=0.001)


def repeating(limits: SchedulerLimits, num_blocks: int = 40, block_size: int = 4) -> Simulation:
    return Simulation(num_blocks, block_size, limits, RepeatingRunner)


@pytest.mark.parametrize(
    ("seed", "num_blocks", "block_size", "limits"),
    [
        (0, 15, 4, SchedulerLimits(8, 24)),  # the cache holds one full request: preemption all the time
        (1, 40, 4, SchedulerLimits(8, 8)),  # guesses get what of the budget nobody decodes with
        (2, 60, 1, SchedulerLimits(16, 64)),
        (3, 20, 3, SchedulerLimits(3, 7)),
        (4, 300, 16, SchedulerLimits(32, 512, prefill_chunk=16)),
        (5, 15, 4, SchedulerLimits(8, 24, prefill_chunk=17)),
        (6, 40, 4, SchedulerLimits(8, 40, prefix_caching=False)),
        (7, 40, 4, SchedulerLimits(8, 40, prefill_chunk=8, deterministic=True)),
    ],
)
@pytest.mark.parametrize("row_cost", [0.001, 0.2])
def test_whatever_is_guessed_each_request_gets_what_it_gets_alone(
    seed: int, num_blocks: int, block_size: int, limits: SchedulerLimits, row_cost: float
) -> None:
    rng = random.Random(seed)
    engine = repeating(replace(limits, speculation=Speculation(5, row_cost)), num_blocks, block_size)

    journeys = serve_crowd(engine, rng, NUM_REQUESTS)

    assert engine.pool.num_free == num_blocks
    assert max(engine.runner.num_tokens_per_step) <= limits.max_num_batched_tokens
    for journey in journeys:
        check_output(engine, journey)
    stats = engine.scheduler.stats()
    assert stats.draft_tokens >= stats.accepted_tokens > 0
    assert stats.generation_tokens == sum(len(engine.output(journey.request.request_id)) for journey in journeys)


def check_output(engine: Simulation, journey: Journey) -> None:
    """All tokens that the request gets without guesses, or the first of them where it was ended before."""
    expected, output = expected_repeating_output(journey.request), engine.output(journey.request.request_id)
    reasons = engine.finish_reasons(journey.request.request_id)
    assert len(reasons) == 1
    if reasons[0] in (FinishReason.STOP, FinishReason.LENGTH):
        assert output == expected
        params = journey.request.sampling
        is_stop = expected[-1] in params.stop_token_ids and len(expected) > params.min_tokens
        assert reasons[0] is (FinishReason.STOP if is_stop else FinishReason.LENGTH)
    assert output == expected[: len(output)]


def test_a_text_that_repeats_takes_fewer_steps() -> None:
    def count_steps(limits: SchedulerLimits) -> int:
        engine = repeating(limits)
        engine.loop.submit(request("r", max_tokens=50))
        engine.run_to_end()
        assert engine.output("r") == expected_repeating_output(request("r", max_tokens=50))
        return engine.scheduler.stats().num_steps

    assert count_steps(SchedulerLimits(8, 64)) == 50
    assert count_steps(SchedulerLimits(8, 64, speculation=CHEAP)) < 40


def test_a_text_that_never_repeats_is_hardly_guessed_at() -> None:
    # given prompts that hold one pair of tokens again and again, so that there is always a guess
    engine = Simulation(40, 4, SchedulerLimits(8, 64, speculation=Speculation(5, row_cost=0.2)))
    one = GenerationRequest("r", (7, 7, 7, 7), SamplingParams(max_tokens=50))
    engine.loop.submit(one)
    engine.run_to_end()
    assert engine.output("r") == expected_output(one)
    # the rows of guesses cost less than a twentieth of the steps
    assert engine.scheduler.stats().draft_tokens * 0.2 < 0.05 * 50


def test_a_stop_token_among_those_that_came_true_ends_the_request_there() -> None:
    one = request("r", max_tokens=50)
    free = expected_repeating_output(one)
    # given a token that is said again and again, and barred for a while
    stop_id = max(free, key=free.count)
    params = replace(one.sampling, stop_token_ids=(stop_id,), min_tokens=25)
    stopped = GenerationRequest("r", one.prompt_token_ids, params)
    engine = repeating(SchedulerLimits(8, 64, speculation=CHEAP))
    engine.loop.submit(stopped)
    engine.run_to_end()
    assert engine.output("r") == expected_repeating_output(stopped)
    assert 25 < len(engine.output("r")) < 50
    assert engine.finish_reasons("r") == [FinishReason.STOP]
    assert engine.pool.num_free == engine.num_blocks


def test_blocks_are_found_by_others_when_their_guesses_came_true_and_not_before() -> None:
    # given a request whose guesses mostly come true
    engine = repeating(SchedulerLimits(8, 64, speculation=CHEAP))
    first = request("first", num_prompt=6, max_tokens=40)
    engine.loop.submit(first)
    while engine.loop.has_work:
        engine.loop.step()
        for sequence in engine.scheduler._running:
            named = [block for block in sequence.blocks if block in engine.pool._key_of_block]
            # when a step is over, all full blocks of what is known and computed are named, and no other
            assert named == sequence.blocks[: sequence.num_computed // 4]
    # then who goes on from all that was said finds it
    said = (*first.prompt_token_ids, *engine.output("first"))
    engine.loop.submit(GenerationRequest("second", said, SamplingParams(max_tokens=4)))
    engine.run_to_end()
    assert engine.events["second"][0].num_cached_tokens == (len(said) - 1) // 4 * 4


def test_the_logits_of_guesses_are_counted_in_what_a_step_takes() -> None:
    assert SchedulerLimits(8, 64).max_num_drawn == 8
    assert SchedulerLimits(8, 64, speculation=CHEAP).max_num_drawn == 48
    # never more than a step computes
    assert SchedulerLimits(8, 40, speculation=CHEAP).max_num_drawn == 40


def test_guesses_preempt_nobody() -> None:
    # given a cache that two requests fill to the last block
    engine = repeating(SchedulerLimits(2, 64, speculation=CHEAP), num_blocks=20, block_size=2)
    for name in ("a", "b"):
        engine.loop.submit(request(name, num_prompt=5, max_tokens=16))
    engine.run_to_end()
    assert engine.scheduler.stats().num_preemptions == 0
    assert engine.scheduler.stats().accepted_tokens > 0
    assert [engine.output(name) for name in ("a", "b")] == [expected_repeating_output(request("", 5, 16))] * 2


def test_a_guess_too_many_for_the_device_is_left_out_and_the_request_goes_on() -> None:
    engine = repeating(SchedulerLimits(1, 17, prefill_chunk=17, speculation=CHEAP))
    engine.loop.submit(request("r", max_tokens=50))
    engine.loop.step()
    # given memory for one token a step
    engine.runner.memory_tokens = 1
    engine.run_to_end()
    assert engine.output("r") == expected_repeating_output(request("r", max_tokens=50))
    assert engine.scheduler.stats().num_out_of_memory > 0


class FailsAmongGuesses(RepeatingRunner):
    """Gives no finite logits for the second token of a step that draws several, the first time."""

    num_failures = 0

    def execute(self, plan: StepPlan) -> StepResult:
        result = super().execute(plan)
        if len(result.tokens) == 1 or self.num_failures:
            return result
        self.num_failures += 1
        failed = SampledToken(0, error="the model gave no finite logits")
        return replace(result, tokens=(result.tokens[0], failed, *result.tokens[2:]))


def test_a_row_after_a_guess_that_fails_is_drawn_again() -> None:
    engine = Simulation(40, 4, SchedulerLimits(8, 64, speculation=CHEAP), FailsAmongGuesses)
    engine.loop.submit(request("r", max_tokens=50))
    engine.run_to_end()
    assert engine.output("r") == expected_repeating_output(request("r", max_tokens=50))
    assert engine.runner.num_failures == 1


def test_an_abort_between_steps_frees_the_blocks_of_guesses_too() -> None:
    engine = repeating(SchedulerLimits(8, 64, speculation=CHEAP))
    engine.loop.submit(random_request(random.Random(0), "r"))
    for _ in range(3):
        engine.loop.step()
    engine.loop.abort("r")
    engine.loop.check_integrity()
    assert engine.pool.num_free == engine.num_blocks


class AskedDrafter:
    """Guesses nothing, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, int]] = []

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, TokenIds]:
        self.asked.append({sequence.request_id: length for sequence, length in wanted.items()})
        return {}

    def stop(self, sequence: Sequence) -> None:
        pass


def test_no_guess_is_asked_for_that_the_full_cache_has_no_place_for() -> None:
    # given four blocks of four, of which two requests hold two each
    drafter = AskedDrafter()
    limits = SchedulerLimits(2, 64, speculation=CHEAP)
    scheduler = Scheduler(limits, BlockPool(4, 4), drafter)
    for one in (request("roomy", num_prompt=5), request("full", num_prompt=7)):
        scheduler.add(one)
    prompts = scheduler.plan_step()
    scheduler.apply(prompts, StepResult((SampledToken(1), SampledToken(2))))

    # when they decode
    scheduler.plan_step()

    # then one has places for two guesses behind its six tokens, and the other's eight fill its blocks
    assert drafter.asked[-1] == {"roomy": 2}
