"""The engine as a child process: real sockets, a real (tiny) model, and real signals."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

import pytest

from server.engine.client import ProcessEngineClient, RestartBudget, RestartPolicy
from server.engine.config import EngineConfig
from server.engine.heartbeat import HeartbeatPolicy
from server.engine.request import EngineStatus, FinishReason, GenerationRequest, SamplingParams, TokenEvent
from server.errors import EngineUnavailable, QueueFull
from tests.server.engine.recording_listener import RecordingListener

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[3]
DEADLINE_SECONDS = 90


class EventLoopThread:
    """An event loop that outlives one test, as a server's does."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def call(self, awaitable: Awaitable[T]) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(awaitable, DEADLINE_SECONDS)

        future: Future[T] = asyncio.run_coroutine_threadsafe(bounded(), self.loop)
        return future.result()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def engine_config(directory: Path) -> EngineConfig:
    return EngineConfig(
        str(directory),
        device="cpu",
        max_num_seqs=2,
        max_waiting=2,
        max_num_batched_tokens=64,
        block_size=16,
        kv_cache_bytes=2**20,
        num_threads=1,
    )


@pytest.fixture(scope="module")
def event_loop() -> Iterator[EventLoopThread]:
    thread = EventLoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def client(event_loop: EventLoopThread, tiny_model: Path) -> Iterator[ProcessEngineClient]:
    client = ProcessEngineClient(engine_config(tiny_model), RestartPolicy(max_restarts=10, first_delay_seconds=0.01))
    event_loop.call(client.start())
    assert event_loop.call(client.wait_until_settled()).state == "ready"
    yield client
    event_loop.call(client.stop(0))


def request(request_id: str, max_tokens: int = 8, first_token: int = 1) -> GenerationRequest:
    return GenerationRequest(request_id, (first_token, 2, 3), SamplingParams(max_tokens=max_tokens, temperature=0.0))


async def collect(client: ProcessEngineClient, wanted: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in client.generate(wanted)]


async def read_all(stream: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in stream]


async def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def is_alive(process_id: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for does not."""
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_concurrent_requests_get_what_they_get_alone(event_loop: EventLoopThread, client: ProcessEngineClient) -> None:
    async def scenario() -> None:
        requests = [request(f"r{index}", 10 + 5 * index, first_token=index) for index in range(4)]
        alone = [await collect(client, one) for one in requests]
        together = await asyncio.gather(*(collect(client, one) for one in requests))
        assert [tokens(events) for events in together] == [tokens(events) for events in alone]
        for one, events in zip(requests, together, strict=True):
            assert len(tokens(events)) == one.sampling.max_tokens
            assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.LENGTH]

    event_loop.call(scenario())


def test_a_reader_that_leaves_returns_its_blocks(event_loop: EventLoopThread, client: ProcessEngineClient) -> None:
    async def scenario() -> None:
        reader = asyncio.create_task(collect(client, request("leaving", 400)))
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_running == 1)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        await wait_for(
            lambda: (
                (stats := client.status().stats) is not None
                and stats.num_free_blocks == stats.num_blocks
                and stats.num_running == 0
            )
        )

    event_loop.call(scenario())


def test_beyond_the_bound_the_queue_is_full(event_loop: EventLoopThread, client: ProcessEngineClient) -> None:
    async def scenario() -> None:
        streams = [client.generate(request(f"r{index}", 300)) for index in range(4)]
        readers = [asyncio.create_task(read_all(stream)) for stream in streams]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await collect(client, request("one too many"))
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)

    event_loop.call(scenario())


def test_a_killed_engine_fails_what_it_had_begun_and_its_successor_takes_the_rest(
    event_loop: EventLoopThread, client: ProcessEngineClient
) -> None:
    async def scenario() -> None:
        expected = tokens(await collect(client, request("before", 20, first_token=9)))
        first_process = client.process_id
        assert first_process is not None
        # given two requests that run and one that waits for them
        running = [asyncio.create_task(collect(client, request(f"running {index}", 500))) for index in range(2)]
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_running == 2)
        waiting = asyncio.create_task(collect(client, request("waiting", 20, first_token=9)))
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_waiting == 1)

        os.kill(first_process, signal.SIGKILL)

        for events in await asyncio.gather(*running):
            assert [event.finish_reason for event in events if event.finish_reason] == [FinishReason.ERROR]
            assert "the engine stopped" in (events[-1].error or "")
        assert client.status().state == "restarting"
        with pytest.raises(EngineUnavailable, match="starting again"):
            await collect(client, request("meanwhile"))
        assert tokens(await waiting) == expected
        assert client.status().state == "ready"
        assert client.process_id != first_process
        assert tokens(await collect(client, request("after", 20, first_token=9))) == expected

    event_loop.call(scenario())


def test_stopping_lets_requests_finish_and_leaves_no_process(event_loop: EventLoopThread, tiny_model: Path) -> None:
    async def scenario() -> None:
        client = ProcessEngineClient(engine_config(tiny_model))
        await client.start()
        assert (await client.wait_until_settled()).state == "ready"
        process_id = client.process_id
        assert process_id is not None
        reader = asyncio.create_task(collect(client, request("last", 50)))
        await asyncio.sleep(0)
        await client.stop(30)
        assert len(tokens(await reader)) == 50
        assert not is_alive(process_id)
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await collect(client, request("too late"))

    event_loop.call(scenario())


def test_stopping_waits_for_no_step_of_a_request_that_is_cut(
    event_loop: EventLoopThread, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given an engine that hangs in a step, and a server that would wait for it longer than this test
    monkeypatch.setattr("server.engine.client.STOP_SECONDS", 10 * DEADLINE_SECONDS)

    async def scenario() -> None:
        client = ProcessEngineClient(engine_config(tiny_model))
        await client.start()
        await client.wait_until_settled()
        reader = asyncio.create_task(collect(client, request("cut", 500)))
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_running == 1)
        process_id = client.process_id
        assert process_id is not None
        os.kill(process_id, signal.SIGSTOP)
        # when the time for its requests is up
        await client.stop(0)
        # then the process is gone, and the request is told
        assert not is_alive(process_id)
        assert (await reader)[-1].finish_reason is FinishReason.ABORTED

    event_loop.call(scenario())


def test_stopping_while_the_model_loads_ends_the_process(event_loop: EventLoopThread, tiny_model: Path) -> None:
    async def scenario() -> None:
        client = ProcessEngineClient(engine_config(tiny_model))
        await client.start()
        with pytest.raises(EngineUnavailable, match="still loading"):
            await collect(client, request("too early"))
        await wait_for(lambda: client.process_id is not None)
        process_id = client.process_id
        assert process_id is not None
        await client.stop(0)
        await client.stop(0)
        assert not is_alive(process_id)
        assert client.status().state == "draining"

    event_loop.call(scenario())


def test_a_model_that_cannot_be_loaded_is_told_in_the_childs_words(event_loop: EventLoopThread, tmp_path: Path) -> None:
    async def scenario() -> EngineStatus:
        client = ProcessEngineClient(engine_config(tmp_path / "no-model"))
        await client.start()
        status = await client.wait_until_settled()
        await client.stop(0)
        return status

    status = event_loop.call(scenario())
    assert status.state == "failed"
    assert status.is_refusal
    assert "no-model" in status.detail


def test_an_engine_that_dies_too_often_is_given_up(event_loop: EventLoopThread, tiny_model: Path) -> None:
    async def kill_at_work(client: ProcessEngineClient, request_id: str) -> int:
        reader = asyncio.create_task(collect(client, request(request_id, 500)))
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_running == 1)
        process_id = client.process_id
        assert process_id is not None
        os.kill(process_id, signal.SIGKILL)
        assert (await reader)[-1].finish_reason is FinishReason.ERROR
        return process_id

    async def scenario() -> None:
        # given an engine that may be restarted once
        listener = RecordingListener()
        policy = RestartPolicy(max_restarts=1, first_delay_seconds=0.01)
        client = ProcessEngineClient(engine_config(tiny_model), policy, listener)
        await client.start()
        await client.wait_until_settled()
        # when it dies twice at work
        first = await kill_at_work(client, "lost")
        await client.wait_until_settled()
        second = await kill_at_work(client, "lost too")
        # then whoever waits for that is told, and the listener of every step on the way
        status = await client.wait_until_failed()
        assert "restarted too often" in status.detail
        assert status.num_restarts == 1
        assert not status.is_refusal
        killed = listener.events[2][2]
        assert "SIGKILL" in str(killed)
        assert listener.events == [
            *[("spawned", first), ("ready", first), ("ended", first, killed, 1), ("restarting", 0.01)],
            *[("spawned", second), ("ready", second), ("ended", second, killed, 1), ("given up", status.detail)],
        ]
        await client.stop(0)

    event_loop.call(scenario())


def test_a_stopped_engine_is_not_ready_until_it_goes_on(event_loop: EventLoopThread, tiny_model: Path) -> None:
    async def scenario() -> None:
        heartbeat = HeartbeatPolicy(beat_seconds=0.02, silent_seconds=0.5, dead_seconds=3600)
        client = ProcessEngineClient(engine_config(tiny_model), heartbeat=heartbeat)
        await client.start()
        await client.wait_until_settled()
        process_id = client.process_id
        assert process_id is not None
        # when its process is stopped, it is not ready, and says why
        os.kill(process_id, signal.SIGSTOP)
        await wait_for(lambda: client.status().state == "unresponsive")
        with pytest.raises(EngineUnavailable, match="no sign of life"):
            await collect(client, request("meanwhile"))
        # when it goes on, it is the same engine and ready
        os.kill(process_id, signal.SIGCONT)
        await wait_for(lambda: client.status().state == "ready")
        assert client.process_id == process_id
        assert len(tokens(await collect(client, request("after")))) == 8
        await client.stop(0)

    event_loop.call(scenario())


def test_an_engine_that_stays_stopped_is_replaced(event_loop: EventLoopThread, tiny_model: Path) -> None:
    async def scenario() -> None:
        listener = RecordingListener()
        client = ProcessEngineClient(
            engine_config(tiny_model),
            RestartPolicy(first_delay_seconds=0.01),
            listener,
            HeartbeatPolicy(beat_seconds=0.02, silent_seconds=0.5, dead_seconds=2),
        )
        await client.start()
        await client.wait_until_settled()
        process_id = client.process_id
        assert process_id is not None
        reader = asyncio.create_task(collect(client, request("lost", 500)))
        await wait_for(lambda: (stats := client.status().stats) is not None and stats.num_running == 1)
        os.kill(process_id, signal.SIGSTOP)
        # then its request ends with the reason, and another process takes its place
        assert "no sign of life" in ((await reader)[-1].error or "")
        await client.wait_until_settled()
        assert client.process_id != process_id
        assert ("pulse", process_id, False) in listener.events
        assert len(tokens(await collect(client, request("after")))) == 8
        await client.stop(0)

    event_loop.call(scenario())


PARENT = """
    import asyncio, json, sys
    from server.engine.client import ProcessEngineClient
    from server.engine.config import EngineConfig

    async def main():
        client = ProcessEngineClient(EngineConfig(sys.argv[1], device="cpu", kv_cache_bytes=2**20, num_threads=1))
        await client.start()
        await client.wait_until_settled()
        print(json.dumps({"child": client.process_id}), flush=True)
        await asyncio.sleep(600)

    asyncio.run(main())
"""


def test_no_engine_outlives_a_killed_parent(tiny_model: Path) -> None:
    script = [sys.executable, "-c", textwrap.dedent(PARENT), str(tiny_model)]
    with subprocess.Popen(script, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = json.loads(parent.stdout.readline())["child"]
        assert is_alive(child)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline, f"the engine's process {child} outlived its parent"
        time.sleep(0.01)


class TestRestartBudget:
    def test_waits_twice_as_long_each_time_and_then_gives_up(self) -> None:
        budget = RestartBudget(RestartPolicy(max_restarts=3, window_seconds=100, first_delay_seconds=0.5))
        assert [budget.next_delay(now) for now in (0, 1, 2, 3)] == [0.5, 1.0, 2.0, None]

    def test_forgets_restarts_that_are_long_past(self) -> None:
        budget = RestartBudget(RestartPolicy(max_restarts=2, window_seconds=100, first_delay_seconds=1))
        assert [budget.next_delay(now) for now in (0, 90, 95, 101, 102)] == [1.0, 2.0, None, 2.0, None]
