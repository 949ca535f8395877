"""The client's contract, on the engine's real loop with a fake model."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from threading import Event

import pytest

from server.engine.block_pool import BlockPool
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.in_process_client import Assemble, InProcessEngineClient
from server.engine.loop import EngineLoop, Publish
from server.engine.request import FinishReason, GenerationRequest, ModelInfo, SamplingParams, TokenEvent
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.step_plan import StepPlan, StepResult
from server.errors import ContextLengthExceeded, EngineUnavailable, InvalidRequest, QueueFull
from server.model.loader import LoadProgress
from tests.fakes import FakeRunner, expected_output, fake_model_info

CONFIG = EngineConfig("fake", max_num_seqs=4, max_waiting=4, max_num_batched_tokens=32)
NUM_BLOCKS, BLOCK_SIZE = 64, 4


class BreakingRunner(FakeRunner):
    """Fails as a broken device does, once a token has been asked for at position 8."""

    def execute(self, plan: StepPlan) -> StepResult:
        if plan.positions.max() >= 8:
            raise RuntimeError("the device is lost")
        return super().execute(plan)


def assemble_with(runner_type: type[FakeRunner]) -> Assemble:
    def assemble(
        config: EngineConfig, report: Callable[[LoadProgress], None], publish: Publish
    ) -> tuple[EngineLoop, ModelInfo]:
        report(LoadProgress(1, 1))
        info = fake_model_info(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        limits = SchedulerLimits(config.max_num_seqs, config.max_num_batched_tokens)
        runner = runner_type(NUM_BLOCKS, BLOCK_SIZE)
        return EngineLoop(Scheduler(limits, BlockPool(NUM_BLOCKS, BLOCK_SIZE)), runner, info, publish), info

    return assemble


def request(request_id: str = "r", num_prompt: int = 3, max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(request_id, tuple(range(num_prompt)), SamplingParams(max_tokens=max_tokens))


async def collect(client: InProcessEngineClient, wanted: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in client.generate(wanted)]


def tokens(events: list[TokenEvent]) -> tuple[int, ...]:
    return tuple(token for event in events for token in event.token_ids)


async def wait_for(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def run(
    scenario: Callable[[InProcessEngineClient], Coroutine[None, None, None]],
    runner_type: type[FakeRunner] = FakeRunner,
) -> None:
    async def with_client() -> None:
        client = InProcessEngineClient(CONFIG, assemble_with(runner_type))
        await client.start()
        await client.wait_until_settled()
        await scenario(client)
        await client.stop(0)

    asyncio.run(asyncio.wait_for(with_client(), 30))


def test_many_at_once_each_get_their_own_answer() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        requests = [request(f"r{index}", num_prompt=1 + index, max_tokens=20) for index in range(8)]
        answers = await asyncio.gather(*(collect(client, one) for one in requests))
        for one, events in zip(requests, answers, strict=True):
            assert tokens(events) == expected_output(one)
            assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.LENGTH]

    run(scenario)


def test_a_late_reader_gets_what_it_missed_in_one_event() -> None:
    # given an engine that goes on from its first token when the reader has that one
    may_go_on = Event()

    class HeldRunner(FakeRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            if plan.positions.max() >= 3:
                assert may_go_on.wait(10)
            return super().execute(plan)

    async def scenario(client: InProcessEngineClient) -> None:
        stream = client.generate(request(num_prompt=3, max_tokens=30))
        first = await anext(stream)
        # and a reader that rests while the engine goes on to the end
        may_go_on.set()
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_running == 0)
        rest = [event async for event in stream]
        assert len(rest) == 1
        assert tokens([first, *rest]) == expected_output(request(num_prompt=3, max_tokens=30))
        assert rest[0].finish_reason is FinishReason.LENGTH

    run(scenario, HeldRunner)


def test_closing_the_generator_returns_the_blocks() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        streams = [client.generate(request(f"r{index}", max_tokens=200)) for index in range(4)]
        for stream in streams:
            await anext(stream)
        for stream in streams:
            await stream.aclose()
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_free_blocks == NUM_BLOCKS)

    run(scenario)


def test_a_deadline_is_on_the_clock_of_this_machine() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        late = replace(request("late"), deadline=time.monotonic())
        timely = replace(request("timely"), deadline=time.monotonic() + 60)
        assert (await collect(client, late))[-1].finish_reason is FinishReason.TIMEOUT
        assert tokens(await collect(client, timely)) == expected_output(timely)

    run(scenario)


def test_a_generator_that_is_never_read_costs_nothing() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        for _ in range(20):
            client.generate(request())
        assert tokens(await collect(client, request())) == expected_output(request())

    run(scenario)


def test_beyond_the_bound_the_queue_is_full() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        readers = [asyncio.create_task(collect(client, request(f"r{index}", max_tokens=200))) for index in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="8 requests"):
            await collect(client, request("one too many"))
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        assert tokens(await collect(client, request())) == expected_output(request())

    run(scenario)


def test_what_could_never_run_is_refused_before_it_queues() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        with pytest.raises(ContextLengthExceeded, match=r"3 tokens and max_tokens asks for 254 more.*256 tokens"):
            await collect(client, request(max_tokens=254))
        with pytest.raises(InvalidRequest, match="token id 1000: ids run from 0 to 999"):
            await collect(client, GenerationRequest("r", (1000,), SamplingParams(max_tokens=1)))
        with pytest.raises(InvalidRequest, match="the prompt is empty"):
            await collect(client, GenerationRequest("r", (), SamplingParams(max_tokens=1)))

    run(scenario)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_breaks_ends_every_request_once() -> None:
    async def scenario(client: InProcessEngineClient) -> None:
        answers = await asyncio.gather(*(collect(client, request(f"r{index}", max_tokens=50)) for index in range(8)))
        for events in answers:
            assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.ERROR]
            assert "the engine stopped" in (events[-1].error or "")
        assert client.status().state == "failed"
        with pytest.raises(EngineUnavailable, match="the engine stopped"):
            await collect(client, request())

    run(scenario, BreakingRunner)


def test_a_model_that_cannot_load_is_told_in_the_status() -> None:
    def assemble(*_: object) -> tuple[EngineLoop, ModelInfo]:
        raise EngineSetupError("config.json is missing")

    async def scenario() -> None:
        client = InProcessEngineClient(CONFIG, assemble)
        await client.start()
        status = await client.wait_until_settled()
        assert (status.state, status.detail) == ("failed", "config.json is missing")
        with pytest.raises(EngineUnavailable, match=r"config\.json is missing"):
            await collect(client, request())
        await client.stop(0)

    asyncio.run(scenario())


def test_stopping_drains_what_it_can_and_aborts_the_rest() -> None:
    async def scenario() -> None:
        client = InProcessEngineClient(CONFIG, assemble_with(FakeRunner))
        await client.start()
        await client.wait_until_settled()
        reader = asyncio.create_task(collect(client, request(max_tokens=20)))
        await asyncio.sleep(0)
        await client.stop(10)
        assert tokens(await reader) == expected_output(request(max_tokens=20))
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await collect(client, request())

    asyncio.run(scenario())


def test_stopping_without_patience_aborts() -> None:
    # given an engine that is not done before it is stopped
    may_go_on = Event()

    class HeldRunner(FakeRunner):
        def execute(self, plan: StepPlan) -> StepResult:
            assert may_go_on.wait(10)
            return super().execute(plan)

    async def scenario() -> None:
        client = InProcessEngineClient(CONFIG, assemble_with(HeldRunner))
        await client.start()
        await client.wait_until_settled()
        reader = asyncio.create_task(collect(client, request(max_tokens=250)))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(client.stop(0))
        assert (await reader)[-1].finish_reason is FinishReason.ABORTED
        may_go_on.set()
        await stopping

    asyncio.run(scenario())
