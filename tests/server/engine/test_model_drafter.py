"""A draft model's guesses change no output, whatever its cache lacks; its own blocks follow the sequences."""

import random
from dataclasses import replace

import pytest

from server.engine import model_drafter
from server.engine.block_pool import BlockPool
from server.engine.draft_length import DraftCost, DraftLength, Speculation
from server.engine.loop import EngineLoop
from server.engine.model_drafter import DraftLimits, ModelDrafter
from server.engine.scheduler import Scheduler, SchedulerLimits
from tests.fakes import FakeRunner, RepeatingRunner, expected_repeating_output, fake_model_info
from tests.server.engine.crowd import serve_crowd
from tests.server.engine.simulation import MAX_MODEL_LEN, Simulation, request
from tests.server.engine.test_speculation import check_output

CHEAP = Speculation(num_tokens=5, row_cost=0.001, draft_cost=0.01)


class MostlyRightRunner(RepeatingRunner):
    """A draft of the RepeatingRunner's model that is wrong for every third token."""

    @staticmethod
    def predict(text: bytes) -> int:
        right = RepeatingRunner.predict(text)
        return right if right % 3 else right + 1 - 2 * (right == 999)


class WithDraftModel(Simulation):
    """An engine whose guesses come from a second runner, with a cache and limits of its own."""

    draft_runner: FakeRunner
    drafter: ModelDrafter

    def draft_with(self, runner: FakeRunner, num_blocks: int, limits: DraftLimits) -> "WithDraftModel":
        self.draft_runner = runner
        self.drafter = ModelDrafter(runner, BlockPool(num_blocks, self.block_size), limits)
        self.scheduler = Scheduler(self.limits, self.pool, self.drafter)
        info = fake_model_info(max_model_len=MAX_MODEL_LEN, num_blocks=self.num_blocks, block_size=self.block_size)
        self.loop = EngineLoop(self.scheduler, self.runner, info, self._take, clock=lambda: self.now)
        return self


def engine_with(
    limits: SchedulerLimits,
    *,
    num_blocks: int = 60,
    num_draft_blocks: int = 60,
    block_size: int = 4,
    draft: type[FakeRunner] = MostlyRightRunner,
    max_model_len: int = MAX_MODEL_LEN,
    max_num_tokens: int = 64,
) -> WithDraftModel:
    engine = WithDraftModel(num_blocks, block_size, limits, RepeatingRunner)
    draft_limits = DraftLimits(limits.max_num_seqs, max_num_tokens, max_model_len, limits.prefix_caching)
    return engine.draft_with(draft(num_draft_blocks, block_size), num_draft_blocks, draft_limits)


@pytest.mark.parametrize(
    ("seed", "num_blocks", "num_draft_blocks", "limits"),
    [
        (0, 15, 15, SchedulerLimits(8, 24)),  # preemption all the time
        (1, 60, 5, SchedulerLimits(8, 24)),  # hardly any room to guess
        (2, 60, 60, SchedulerLimits(16, 64)),
        (3, 40, 40, SchedulerLimits(8, 40, prefix_caching=False)),
        (4, 40, 40, SchedulerLimits(8, 40, prefill_chunk=8, deterministic=True)),
    ],
)
@pytest.mark.parametrize("max_num_tokens", [3, 64])
def test_whatever_the_model_guesses_each_request_gets_what_it_gets_alone(
    seed: int, num_blocks: int, num_draft_blocks: int, limits: SchedulerLimits, max_num_tokens: int
) -> None:
    engine = engine_with(
        replace(limits, speculation=CHEAP),
        num_blocks=num_blocks,
        num_draft_blocks=num_draft_blocks,
        max_num_tokens=max_num_tokens,
    )
    journeys = serve_crowd(engine, random.Random(seed), 120)
    for journey in journeys:
        check_output(engine, journey)
    assert max(engine.draft_runner.num_tokens_per_step) <= max(max_num_tokens, limits.max_num_seqs)
    # then nothing is left of any request, in either cache
    engine.drafter.check_integrity()
    assert engine.drafter._pool.num_free == num_draft_blocks
    assert engine.pool.num_free == num_blocks
    assert engine.scheduler.stats().accepted_tokens > 0


def test_a_draft_model_that_is_right_saves_most_steps() -> None:
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP), draft=RepeatingRunner)
    engine.loop.submit(request("r", max_tokens=50))
    engine.run_to_end()
    assert engine.output("r") == expected_repeating_output(request("r", max_tokens=50))
    # a guess that came true is never computed again, so each step gives all guesses and one token more
    assert engine.scheduler.stats().num_steps < 15
    assert engine.scheduler.stats().accepted_tokens == engine.scheduler.stats().draft_tokens


def test_a_draft_model_that_is_always_wrong_is_hardly_asked() -> None:
    speculation = Speculation(5, row_cost=0.05, draft_cost=0.1)
    engine = engine_with(SchedulerLimits(8, 64, speculation=speculation), draft=FakeRunner)
    engine.loop.submit(request("r", max_tokens=50))
    engine.run_to_end()
    assert engine.scheduler.stats().accepted_tokens == 0
    # steps of the draft model and rows of guesses, against the 50 steps; the first guesses cost most
    drafted, asked = engine.scheduler.stats().draft_tokens, sum(engine.draft_runner.num_tokens_per_step[1:])
    assert drafted * 0.05 + len(engine.draft_runner.num_tokens_per_step) * 0.1 + asked * 0.005 < 0.05 * 50


def test_a_prompt_is_read_by_the_draft_model_in_parts_and_only_once() -> None:
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP), max_num_tokens=8, draft=RepeatingRunner)
    long = request("a", num_prompt=40, max_tokens=20)
    for one in (long, replace(long, request_id="b")):
        engine.loop.submit(one)
    engine.run_to_end()
    assert engine.output("a") == engine.output("b") == expected_repeating_output(long)
    # the second sample finds the first one's blocks
    assert sum(engine.draft_runner.num_tokens_per_step) < 40 + 2 * 20 + 8


def test_behind_the_draft_models_context_nothing_is_guessed() -> None:
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP), max_model_len=12, draft=RepeatingRunner)
    engine.loop.submit(request("r", num_prompt=5, max_tokens=50))
    engine.run_to_end()
    assert engine.output("r") == expected_repeating_output(request("r", 5, 50))
    assert 0 < engine.scheduler.stats().draft_tokens <= 7


def test_a_draft_model_without_memory_gives_no_guess_and_harms_nobody() -> None:
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP))
    engine.draft_runner.memory_tokens = 2
    for name in ("a", "b", "c"):
        engine.loop.submit(request(name, max_tokens=30))
    engine.run_to_end()
    assert [engine.output(name) for name in ("a", "b", "c")] == [expected_repeating_output(request("", 5, 30))] * 3
    assert engine.scheduler.stats().num_out_of_memory == 0
    engine.drafter.check_integrity()


def test_a_draft_model_that_ran_out_of_memory_rests_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_drafter, "STEPS_WITHOUT_GUESSES", 8)
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP))
    engine.loop.submit(request("r", max_tokens=50))
    # given a device that has no memory for the first of its steps
    engine.draft_runner.memory_tokens = 2
    engine.loop.step()
    engine.loop.step()
    engine.draft_runner.memory_tokens = None
    # when it has some again
    for _ in range(8):
        engine.loop.step()
    # then it has not been tried since, and later it is
    assert engine.draft_runner.num_tokens_per_step == []
    engine.run_to_end()
    assert engine.scheduler.stats().accepted_tokens > 0
    assert engine.output("r") == expected_repeating_output(request("", 5, 50))


def test_a_draft_step_without_memory_leaves_nobody_with_blocks_that_it_did_not_write() -> None:
    # given room for one of two prompts that begin alike, so that the second finds the blocks of the first but no place
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP), num_draft_blocks=5, draft=RepeatingRunner)
    engine.draft_runner.memory_tokens = 2
    for name in ("a", "b"):
        engine.loop.submit(request(name, num_prompt=16, max_tokens=10))
    # when the draft model runs out of memory, and has some again
    engine.loop.step()
    engine.loop.step()
    engine.draft_runner.memory_tokens = None
    # then it reads nothing that was never written, which its runner would say
    engine.run_to_end()
    for name in ("a", "b"):
        assert engine.output(name) == expected_repeating_output(request("", 16, 10))
    engine.drafter.check_integrity()


def test_a_draft_model_without_finite_logits_is_asked_once() -> None:
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP))
    engine.draft_runner.failing_request_ids.add("sick")
    for name in ("sick", "well"):
        engine.loop.submit(request(name, max_tokens=30))
    engine.run_to_end()
    assert engine.output("sick") == engine.output("well") == expected_repeating_output(request("", 5, 30))
    engine.drafter.check_integrity()


def test_an_abort_frees_the_draft_models_blocks_too() -> None:
    engine = engine_with(SchedulerLimits(8, 64, speculation=CHEAP))
    engine.loop.submit(request("r", max_tokens=50))
    for _ in range(4):
        engine.loop.step()
    assert engine.drafter._pool.num_free < 60
    engine.loop.abort("r")
    engine.drafter.check_integrity()
    assert engine.drafter._pool.num_free == 60


def test_a_guess_is_not_tried_again_where_catching_up_costs_more_than_trying_may() -> None:
    length = DraftLength()
    length.note(9, 0)
    length.note(9, 0)
    # given a draft as large as its model on a CPU
    cost = Speculation(8, row_cost=0.15, draft_cost=1.0).relative_cost(1, 1)
    assert cost == DraftCost(pytest.approx(1.15), pytest.approx(0.15))
    assert [length.choose(8, cost) for _ in range(200)] == [0] * 200
