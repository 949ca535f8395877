"""Jobs run one at a time in a process of their own, and every end of that process is an end of the job."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from server.jobs.event_log import EventKind
from server.jobs.record import JobProgress, JobRecord, JobState
from server.jobs.runner_lock import RunnerLock
from server.jobs.store import JobStore
from server.jobs.supervisor import MAX_STARTS
from tests.server.jobs.recipes import make_recipe
from tests.server.jobs.supervising import (
    DEADLINE_SECONDS,
    ends,
    is_alive,
    reaches,
    reports_progress,
    scripted_supervisor,
    supervised,
)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def submit(store: JobStore, part: str, output: str = "out") -> JobRecord:
    return store.submit(make_recipe(store.path.parent / output, source=part))


def run_to_its_end(store: JobStore, part: str) -> JobRecord:
    async def run() -> JobRecord:
        async with supervised(store):
            return await ends(store, submit(store, part).id)

    return asyncio.run(run())


def test_a_job_that_succeeds_has_the_report_and_the_last_progress(store: JobStore, tmp_path: Path) -> None:
    job = run_to_its_end(store, "succeed")
    assert job.state is JobState.SUCCEEDED
    assert job.progress == JobProgress("blocks", 3, 3, 0.0)
    assert job.report_json is not None
    assert json.loads(job.report_json)["perplexity"] == {"original": 32.5, "quantized": 35.25}
    assert store.succeeded_outputs() == (tmp_path / "out",)


def test_the_quantizer_gets_the_options_of_the_command_line(store: JobStore, tmp_path: Path) -> None:
    job = run_to_its_end(store, "succeed")
    assert job.report_json is not None
    what = [str(tmp_path / "out"), "--bits", "4", "--group-size", "64", "--format", "auto", "--method", "awq"]
    how = ["--calib", "self", "--seed", "0", "--device", "auto", "--progress-format", "json", "--verbose"]
    assert json.loads(job.report_json)["args"] == [*what, *how]


def test_what_the_quantizer_says_on_its_way_is_noted(store: JobStore) -> None:
    job = run_to_its_end(store, "tell_all")
    said = [event for event in store.events_after(job.id, 0) if event.kind in (EventKind.NOTICE, EventKind.BLOCK)]
    layer = {"name": "model.layers.2.mlp.up_proj", "formula": "x^0.45", "plain": 0.5, "chosen": 0.25}
    assert [event.data for event in said] == [
        {"message": "resuming at block 3 of 3"},
        {"block": "model.layers.2", "plain": 0.75, "chosen": 0.5, "kept": "searched", "layers": [layer]},
    ]


def test_whoever_waits_for_news_is_woken_by_all_that_happens_and_told_of_the_end(store: JobStore) -> None:
    async def run() -> None:
        async with supervised(store) as supervisor:
            job = submit(store, "succeed")
            while not store.get(job.id).state.is_terminal:
                upcoming = supervisor.news.upcoming()
                if not store.get(job.id).state.is_terminal:
                    await asyncio.wait_for(upcoming.wait(), DEADLINE_SECONDS)
            upcoming = supervisor.news.upcoming()
        assert upcoming.is_set()
        assert supervisor.news.is_closed

    asyncio.run(run())


def test_noise_on_the_pipes_does_not_disturb_a_job(store: JobStore) -> None:
    job = run_to_its_end(store, "succeed_amid_noise")
    assert (job.state, job.progress) == (JobState.SUCCEEDED, JobProgress("blocks", 3, 3, 0.0))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("fail", "group size 128 does not divide the 576 in features of model.layers.0.self_attn.q_proj"),
        ("crash", "exit code 1; its last words: .*MemoryError: no room for the Gram matrix"),
        ("say_nothing", "without an error and without a checkpoint"),
    ],
)
def test_a_job_that_fails_says_why(store: JobStore, part: str, reason: str) -> None:
    job = run_to_its_end(store, part)
    assert job.state is JobState.FAILED
    assert job.error is not None
    assert re.search(reason, job.error)


@pytest.mark.parametrize("event_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_killed_quantizer_fails_its_job_and_the_next_one_runs(
    store: JobStore, event_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def run() -> tuple[JobRecord, JobRecord]:
        async with supervised(store):
            killed, following = submit(store, "hang_with_child"), submit(store, "succeed", "following")
            job = await reports_progress(store, killed.id)
            assert job.progress is not None
            grandchild = int(job.progress.phase)
            os.kill(parent_of(grandchild), signal.SIGKILL)
            ended = await ends(store, killed.id), await ends(store, following.id)
            assert not is_alive(grandchild)
            return ended

    with asyncio.Runner(loop_factory=event_loop) as runner:
        killed, following = runner.run(run())
    assert killed.state is JobState.FAILED
    assert killed.error is not None
    assert "SIGKILL" in killed.error
    assert following.state is JobState.SUCCEEDED


def test_jobs_run_one_at_a_time(store: JobStore) -> None:
    async def run() -> None:
        async with supervised(store) as supervisor:
            first, second = submit(store, "hang"), submit(store, "hang", "second")
            await reports_progress(store, first.id)
            assert store.get(second.id).state is JobState.QUEUED
            store.request_cancel(first.id)
            supervisor.wake()
            await reports_progress(store, second.id)
            assert store.get(first.id).state is JobState.CANCELLED

    asyncio.run(run())


@pytest.mark.parametrize(
    ("part", "grace_seconds", "state"),
    [
        ("hang", 10.0, JobState.CANCELLED),
        ("ignore_sigint", 0.2, JobState.CANCELLED),
        # its checkpoint is whole by the time it ends, and a whole checkpoint is no waste
        ("finish_on_sigint", 10.0, JobState.SUCCEEDED),
    ],
)
def test_a_running_job_that_is_cancelled_ends(
    store: JobStore, part: str, grace_seconds: float, state: JobState
) -> None:
    async def run() -> JobRecord:
        async with supervised(store, grace_seconds=grace_seconds) as supervisor:
            job = submit(store, part)
            await reports_progress(store, job.id)
            assert store.request_cancel(job.id).state is JobState.RUNNING
            supervisor.wake()
            return await ends(store, job.id)

    assert asyncio.run(run()).state is state


def test_a_quantizer_keeps_its_finished_blocks_when_the_server_stops_and_not_when_its_job_is_cancelled(
    store: JobStore,
) -> None:
    # given jobs whose quantizer tells by which signal it ends: SIGINT removes everything, SIGTERM keeps what is done
    async def cancel_one_and_stop_with_the_other() -> tuple[JobRecord, JobRecord]:
        async with supervised(store) as supervisor:
            cancelled = submit(store, "name_signal", "cancelled")
            await reports_progress(store, cancelled.id)
            store.request_cancel(cancelled.id)
            supervisor.wake()
            await ends(store, cancelled.id)
            stopped = submit(store, "name_signal", "stopped")
            await reports_progress(store, stopped.id)
        return cancelled, stopped

    jobs = asyncio.run(cancel_one_and_stop_with_the_other())

    signals = [job.recipe.output.with_suffix(".signal").read_text() for job in jobs]
    assert signals == ["SIGINT", "SIGTERM"]


def test_a_server_that_stops_queues_its_job_again_and_the_next_one_runs_it(store: JobStore) -> None:
    async def start_and_stop() -> JobRecord:
        async with supervised(store):
            return await reports_progress(store, submit(store, "hang").id)

    job = asyncio.run(start_and_stop())
    stopped = store.get(job.id)
    assert (stopped.state, stopped.num_starts, stopped.progress) == (JobState.QUEUED, 0, None)

    async def start_again() -> JobRecord:
        async with supervised(store):
            return await reports_progress(store, job.id)

    assert asyncio.run(start_again()).state is JobState.RUNNING


def test_a_killed_server_leaves_no_orphan_and_its_job_runs_again(store: JobStore) -> None:
    # given a server with a running job
    program = (
        "import asyncio, sys; from pathlib import Path; from server.jobs.store import JobStore\n"
        "from tests.server.jobs.supervising import supervised\n"
        "async def serve():\n"
        "    async with supervised(JobStore(Path(sys.argv[1]))):\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(serve())\n"
    )
    job = submit(store, "hang")
    server = subprocess.Popen([sys.executable, "-c", program, str(store.path)])
    asyncio.run(reports_progress(store, job.id))
    (quantizer,) = children_of(server.pid)

    # when the server is killed
    server.send_signal(signal.SIGKILL)
    server.wait()

    # then its quantizer is gone too, and the next server starts the job again
    end = time.monotonic() + DEADLINE_SECONDS
    while is_alive(quantizer):
        assert time.monotonic() < end

    async def next_server() -> JobRecord:
        async with supervised(store):
            return await reaches(store, job.id, lambda job: job.num_starts == 2 and job.progress is not None)

    assert asyncio.run(next_server()).state is JobState.RUNNING


@pytest.mark.parametrize(
    ("num_starts", "cancel", "output_is_there", "state"),
    [
        (1, False, True, JobState.SUCCEEDED),
        (1, True, False, JobState.CANCELLED),
        (MAX_STARTS, False, False, JobState.FAILED),
        (MAX_STARTS - 1, False, False, JobState.SUCCEEDED),
    ],
)
def test_a_job_that_a_dead_server_left_is_settled(
    store: JobStore, num_starts: int, cancel: bool, output_is_there: bool, state: JobState
) -> None:
    # given a job that was running when its server died for the num_starts-th time
    job = submit(store, "succeed")
    for _ in range(num_starts - 1):
        store.claim_next()
        store.requeue(job.id, num_starts=store.get(job.id).num_starts)
    assert store.claim_next() is not None
    if cancel:
        store.request_cancel(job.id)
    if output_is_there:
        job.recipe.output.mkdir()

    # when the next server starts
    async def next_server() -> JobRecord:
        async with supervised(store):
            return await ends(store, job.id)

    # then the job ends as the evidence says, or runs again
    assert asyncio.run(next_server()).state is state


def test_of_two_servers_on_one_file_one_runs_the_jobs_of_both_and_the_other_takes_over(store: JobStore) -> None:
    async def run() -> None:
        # given two servers, of which the first runs a job
        first, second = scripted_supervisor(store), scripted_supervisor(other_store)
        first.start()
        job = submit(store, "hang")
        await reports_progress(store, job.id)
        second.start()

        # when a client of the second cancels it and queues another, then the first does both
        other_store.request_cancel(job.id)
        assert (await ends(store, job.id)).state is JobState.CANCELLED
        job = submit(other_store, "hang")
        await reports_progress(store, job.id)
        assert not RunnerLock(store.path).acquire()

        # when the first one stops, then the second runs what it left
        await first.stop()
        taken_over = await reports_progress(store, job.id)
        assert (taken_over.state, taken_over.num_starts) == (JobState.RUNNING, 1)
        await second.stop()

    other_store = JobStore(store.path)
    asyncio.run(run())
    assert RunnerLock(store.path).acquire()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
