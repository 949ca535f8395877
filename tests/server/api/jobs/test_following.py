"""The events of a job as a stream: from its beginning, from the last that was seen, to its end or the server's."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.api.jobs.following import JobFollower, Pace
from server.api.sse import HEARTBEAT, RECONNECT
from server.errors import NotFound, QueueFull, ShuttingDown
from server.http_server import CLOSE_SECONDS, GracefulServer, listen
from server.jobs.event_log import EventKind
from server.jobs.news import JobNews
from server.jobs.record import JobProgress, JobRecord
from server.jobs.runner_lock import RunnerLock
from server.jobs.store import JobStore
from server.settings import load_settings
from tests.server.api.conftest import AppFactory
from tests.server.api.fake_engine import FakeEngineClient
from tests.server.jobs.recipes import make_recipe

DEADLINE_SECONDS = 20.0
QUICK = Pace(poll_seconds=0.01, rest_seconds=0.0, heartbeat_seconds=1000.0)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def submit(store: JobStore) -> JobRecord:
    return store.submit(make_recipe(store.path.parent / "out"))


def finished(store: JobStore) -> JobRecord:
    job = submit(store)
    store.claim_next()
    store.record_progress(job.id, JobProgress("blocks", 3, 3, 0.0))
    return store.succeed(job.id, '{"bits_per_weight": 4.5}')


def event_in(frame: bytes) -> dict[str, object]:
    """The payload of a numbered frame, whose number the payload has too."""
    number, data, *end = frame.decode().split("\n")
    event: dict[str, object] = json.loads(data.removeprefix("data: "))
    assert (number, end) == (f"id: {event['id']}", ["", ""])
    return event


def follow(store: JobStore, job_id: str, after: int = 0) -> list[dict[str, object]]:
    """All events until the stream ends by itself."""

    async def run() -> list[bytes]:
        async with asyncio.timeout(DEADLINE_SECONDS):
            return [frame async for frame in JobFollower(store, JobNews(), pace=QUICK).frames(job_id, after)]

    first, *frames = asyncio.run(run())
    assert first == RECONNECT
    return [event_in(frame) for frame in frames]


def test_a_job_that_is_over_is_told_at_once_and_its_last_event_has_all_of_it(store: JobStore) -> None:
    job = finished(store)

    events = follow(store, job.id)

    assert [event["type"] for event in events] == ["state", "state", "progress", "state"]
    assert {(event["object"], event["job_id"]) for event in events} == {("quantization.job.event", job.id)}
    assert events[2]["data"] == {"phase": "blocks", "done": 3, "total": 3, "seconds_left": 0.0}
    last = events[-1]["data"]
    assert isinstance(last, dict)
    assert (last["id"], last["status"], last["report"]) == (job.id, "succeeded", {"bits_per_weight": 4.5})


def test_whoever_comes_again_is_told_what_it_has_not_seen(store: JobStore) -> None:
    job = finished(store)
    events = follow(store, job.id)
    seen = events[1]["id"]
    assert isinstance(seen, int)
    assert follow(store, job.id, after=seen) == events[2:]


def test_many_listeners_hear_a_job_from_its_queue_to_its_end(store: JobStore) -> None:
    async def listen(follower: JobFollower, job_id: str) -> list[bytes]:
        return [frame async for frame in follower.frames(job_id, 0)]

    async def run() -> list[list[bytes]]:
        # given twenty listeners of a job, who would look again by themselves only long after the deadline
        news = JobNews()
        follower = JobFollower(store, news, pace=Pace(poll_seconds=1000, rest_seconds=0, heartbeat_seconds=1000))
        job = submit(store)
        listening = [asyncio.create_task(listen(follower, job.id)) for _ in range(20)]

        # when the job runs and ends, and each step is told
        for step in (
            store.claim_next,
            lambda: store.record_event(job.id, EventKind.NOTICE, {"message": "resuming"}),
            lambda: store.fail(job.id, "the disk is full"),
        ):
            await asyncio.to_thread(step)
            news.tell()
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await asyncio.gather(*listening)

    # then all have heard all of it
    heard = [[event_in(frame) for frame in frames[1:]] for frames in asyncio.run(run())]
    assert all(events == heard[0] for events in heard)
    assert [event["type"] for event in heard[0]] == ["state", "state", "notice", "state"]
    assert heard[0][-1]["data"]["error"] == {"message": "the disk is full"}


def test_a_silent_stream_says_that_it_lives(store: JobStore) -> None:
    async def run() -> list[bytes]:
        pace = Pace(poll_seconds=0.01, rest_seconds=0.0, heartbeat_seconds=0.02)
        frames = JobFollower(store, JobNews(), pace=pace).frames(submit(store).id, 0)
        async with asyncio.timeout(DEADLINE_SECONDS):
            return [await anext(frames) for _ in range(4)]

    assert asyncio.run(run())[2:] == [HEARTBEAT, HEARTBEAT]


def test_a_stream_ends_with_the_server_and_not_before_what_has_happened(store: JobStore) -> None:
    async def run() -> list[bytes]:
        news = JobNews()
        job = submit(store)
        news.close()
        frames = JobFollower(store, news, pace=QUICK).frames(job.id, 0)
        heard = [await anext(frames) for _ in range(2)]
        with pytest.raises(ShuttingDown, match="Last-Event-ID"):
            await anext(frames)
        return heard

    _, queued = asyncio.run(run())
    assert event_in(queued)["data"] == {"status": "queued"}


def test_listeners_are_bounded_and_one_that_leaves_makes_room(store: JobStore) -> None:
    async def run() -> None:
        job = submit(store)
        follower = JobFollower(store, JobNews(), pace=QUICK, max_listeners=1)

        async def first_of(frames: AsyncGenerator[bytes, None]) -> bytes:
            return await anext(frames)

        staying = follower.frames(job.id, 0)
        await first_of(staying)
        with pytest.raises(QueueFull, match="1 clients follow jobs"):
            await first_of(follower.frames(job.id, 0))
        await staying.aclose()
        assert await first_of(follower.frames(job.id, 0)) == RECONNECT

    asyncio.run(run())


def test_an_unknown_job_has_no_events(store: JobStore) -> None:
    with pytest.raises(NotFound):
        follow(store, "qjob-0")


@contextmanager
def stream(url: str, job_id: str, **headers: str) -> Iterator[Iterator[str]]:
    """The lines of a stream as they come."""
    with httpx.stream("GET", f"{url}/quantize/{job_id}/events", headers=headers, timeout=DEADLINE_SECONDS) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        yield response.iter_lines()


def next_event(lines: Iterator[str]) -> dict[str, object]:
    data = next(line for line in lines if line.startswith("data: "))
    event: dict[str, object] = json.loads(data.removeprefix("data: "))
    return event


@pytest.fixture
def shared_store(tmp_path: Path) -> Iterator[JobStore]:
    """The file of the server's jobs, as another server has it that runs them: this one only shows them."""
    path = tmp_path / "jobs-0.sqlite"
    lock, store = RunnerLock(path), JobStore(path)
    assert lock.acquire()
    yield store
    lock.release()


def test_a_job_that_another_server_runs_is_followed_over_a_socket_and_again_after_a_break(
    shared_store: JobStore, live_url: str
) -> None:
    # given a client that follows a job, and loses its connection
    job = submit(shared_store)
    with stream(live_url, job.id) as lines:
        assert next_event(lines)["data"] == {"status": "queued"}
        shared_store.claim_next()
        running = next_event(lines)
        assert running["data"] == {"status": "running"}

    # when it comes again, then it hears the rest to the end
    with stream(live_url, job.id, **{"Last-Event-ID": str(running["id"])}) as lines:
        shared_store.record_progress(job.id, JobProgress("blocks", 1, 30, 12.5))
        assert next_event(lines)["data"] == {"phase": "blocks", "done": 1, "total": 30, "seconds_left": 12.5}
        shared_store.succeed(job.id, None)
        last = next_event(lines)
        assert last["data"]["status"] == "succeeded"
        assert [line for line in lines if line] == ["data: [DONE]"]

    # and once it has heard all, it is told not to come again
    events = f"{live_url}/quantize/{job.id}/events"
    assert httpx.get(events, headers={"Last-Event-ID": str(last["id"])}).status_code == httpx.codes.NO_CONTENT


@pytest.mark.parametrize(
    ("job_id", "header", "status"), [("qjob-0", None, 404), ("qjob-0", "1", 404), (None, "x", 400), (None, "-1", 400)]
)
def test_what_cannot_be_followed_is_refused_with_its_status(
    shared_store: JobStore, live_url: str, job_id: str | None, header: str | None, status: int
) -> None:
    known = submit(shared_store).id
    headers = {} if header is None else {"Last-Event-ID": header}
    answer = httpx.get(f"{live_url}/quantize/{job_id or known}/events", headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


@contextmanager
def running_server(make_app: AppFactory, engine: FakeEngineClient) -> Iterator[tuple[GracefulServer, str]]:
    """The application as the command line runs it, its jobs stopped with it."""
    listener, ready, app = listen("127.0.0.1", 0), threading.Event(), make_app()
    stop_jobs = app.state.job_supervisor.stop
    server = GracefulServer(app, load_settings({}), engine, announce=ready.set, stop_jobs=stop_jobs)
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert ready.wait(DEADLINE_SECONDS)
    yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


def test_the_end_of_the_server_ends_a_stream_at_once(
    shared_store: JobStore, make_app: AppFactory, engine: FakeEngineClient
) -> None:
    # given a server with a listener of a job that runs
    job = submit(shared_store)
    with running_server(make_app, engine) as (server, url), stream(url, job.id) as lines:
        next_event(lines)

        # when the server is told to end
        told_s = time.monotonic()
        server.should_exit = True

        # then the stream says so and is whole
        error = next_event(lines)["error"]
        assert error["code"] == "shutting_down"
        assert [line for line in lines if line] == ["data: [DONE]"]
        assert time.monotonic() - told_s < CLOSE_SECONDS
