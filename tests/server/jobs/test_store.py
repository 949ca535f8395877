"""The job file: which way a state may go, who wins a race, what survives."""

import itertools
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.errors import Conflict, InvalidRequest, JobStoreUnavailable, NotFound, QueueFull
from server.jobs.record import TRANSITIONS, JobProgress, JobRecipe, JobRecord, JobState
from server.jobs.store import IdempotencyKey, JobStore
from tests.server.jobs.recipes import make_recipe

# how a running job is taken to each state that it may go to
MOVES: Mapping[JobState, Callable[[JobStore, str], JobRecord]] = {
    JobState.SUCCEEDED: lambda store, job_id: store.succeed(job_id, '{"bits_per_weight":4.5}'),
    JobState.FAILED: lambda store, job_id: store.fail(job_id, "the disk is full"),
    JobState.CANCELLED: lambda store, job_id: store.finish_cancel(job_id),
    JobState.QUEUED: lambda store, job_id: store.requeue(job_id, num_starts=0),
}


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def submit(store: JobStore, output: str = "out") -> JobRecord:
    return store.submit(make_recipe(store.path.parent / output))


class AnyOrderOfCalls(RuleBasedStateMachine):
    """Whatever is called in whatever order, the store holds what a dictionary and the table of transitions predict."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.store = JobStore(Path(self.directory.name) / "jobs.sqlite")
        self.expected: dict[str, JobState] = {}
        self.outputs = itertools.count()

    def teardown(self) -> None:
        self.store.close()
        self.directory.cleanup()

    @rule()
    def submit(self) -> None:
        job = submit(self.store, f"out-{next(self.outputs)}")
        self.expected[job.id] = JobState.QUEUED

    @rule()
    def claim(self) -> None:
        queued = [job_id for job_id, state in self.expected.items() if state is JobState.QUEUED]
        claimed = self.store.claim_next()
        assert (claimed.id if claimed else None) == (queued[0] if queued else None)
        if claimed:
            self.expected[claimed.id] = JobState.RUNNING

    @precondition(lambda self: self.expected)
    @rule(data=st.data(), to=st.sampled_from(sorted(MOVES, key=lambda state: state.value)))
    def move(self, data: st.DataObject, to: JobState) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.expected)))
        if self.expected[job_id] is JobState.RUNNING:
            assert MOVES[to](self.store, job_id).state is to
            self.expected[job_id] = to
        else:
            with pytest.raises(Conflict):
                MOVES[to](self.store, job_id)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def request_cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.expected)))
        if self.expected[job_id] in (JobState.SUCCEEDED, JobState.FAILED):
            with pytest.raises(Conflict):
                self.store.request_cancel(job_id)
        else:
            job = self.store.request_cancel(job_id)
            assert job.cancel_requested_at is not None or self.expected[job_id] is JobState.CANCELLED
            if self.expected[job_id] is JobState.QUEUED:
                self.expected[job_id] = JobState.CANCELLED

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = JobStore(self.store.path)

    @invariant()
    def holds_what_is_expected(self) -> None:
        page = self.store.list_jobs(limit=100)
        assert {job.id: job.state for job in page.jobs} == self.expected
        for job in page.jobs:
            assert job.state in job.entered_at
            # what listeners hear ends where the job is
            events = self.store.events_after(job.id, 0)
            assert events[-1].data["status"] == job.state.value
            assert events[-1].is_last == job.state.is_terminal


TestAnyOrderOfCalls = AnyOrderOfCalls.TestCase
TestAnyOrderOfCalls.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def test_terminal_states_lead_nowhere() -> None:
    terminal = {state for state in JobState if state.is_terminal}
    assert terminal == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert all(not TRANSITIONS[state] for state in terminal)


def test_a_new_job_is_what_was_asked_for(store: JobStore, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "out")
    job = store.submit(recipe)
    assert store.get(job.id) == job
    assert (job.state, job.recipe, job.progress, job.num_starts) == (JobState.QUEUED, recipe, None, 0)


def test_an_acknowledged_job_survives_kill_9(tmp_path: Path) -> None:
    # given a process that submits jobs and says so after each, and the last of them running
    program = (
        "import sys, itertools; from pathlib import Path; from server.jobs.store import JobStore\n"
        "from tests.server.jobs.recipes import make_recipe\n"
        "store = JobStore(Path(sys.argv[1]))\n"
        "for number in itertools.count():\n"
        "    print(store.submit(make_recipe(Path(sys.argv[1] + f'-{number}'))).id, flush=True)\n"
        "    store.claim_next()\n"
    )
    path = tmp_path / "jobs.sqlite"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(20)]

    # when it is killed in the middle of it
    process.send_signal(signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.wait()

    # then every job that it said was queued is there, whole
    store = JobStore(path)
    states = {job_id: store.get(job_id).state for job_id in acknowledged}
    assert set(states.values()) <= {JobState.QUEUED, JobState.RUNNING}
    assert JobState.RUNNING in states.values()


def test_two_servers_never_claim_the_same_job(tmp_path: Path) -> None:
    stores = [JobStore(tmp_path / "jobs.sqlite") for _ in range(2)]
    submitted = {submit(stores[0], f"out-{number}").id for number in range(30)}

    def claim_all(store: JobStore) -> list[str]:
        return [job.id for job in iter(store.claim_next, None)]

    with ThreadPoolExecutor(4) as pool:
        claims = [job_id for ids in pool.map(claim_all, stores * 2) for job_id in ids]

    assert sorted(claims) == sorted(submitted)


def test_jobs_are_claimed_in_the_order_they_came(store: JobStore) -> None:
    ids = [submit(store, f"out-{number}").id for number in range(3)]
    assert [job.id for job in iter(store.claim_next, None)] == ids


def test_progress_shows_and_is_forgotten_when_the_job_starts_over(store: JobStore) -> None:
    job = submit(store)
    store.claim_next()
    store.record_progress(job.id, JobProgress("blocks", 3, 30, 12.5))
    assert store.get(job.id).progress == JobProgress("blocks", 3, 30, 12.5)
    assert store.requeue(job.id, num_starts=1).progress is None


def test_late_progress_does_not_touch_a_job_that_is_over(store: JobStore) -> None:
    job = submit(store)
    store.claim_next()
    store.fail(job.id, "the disk is full")
    store.record_progress(job.id, JobProgress("blocks", 30, 30, 0.0))
    assert store.get(job.id).progress is None


def test_two_active_jobs_cannot_write_one_output(store: JobStore) -> None:
    first = submit(store)
    with pytest.raises(Conflict, match=first.id):
        submit(store)
    store.request_cancel(first.id)
    assert submit(store).state is JobState.QUEUED


def test_the_same_key_and_body_make_one_job(store: JobStore, tmp_path: Path) -> None:
    key = IdempotencyKey("retry-1", "digest-of-the-body")
    first = store.submit(make_recipe(tmp_path / "out"), key)
    store.claim_next()
    store.succeed(first.id, None)
    again = store.submit(make_recipe(tmp_path / "out"), key)
    assert again.id == first.id
    assert store.find_submission(key) == store.get(first.id)


def test_a_key_used_with_another_body_is_a_conflict(store: JobStore, tmp_path: Path) -> None:
    store.submit(make_recipe(tmp_path / "out"), IdempotencyKey("retry-1", "digest-of-the-body"))
    with pytest.raises(Conflict, match="retry-1"):
        store.submit(make_recipe(tmp_path / "other"), IdempotencyKey("retry-1", "another-digest"))


def test_a_full_queue_refuses_and_loses_nothing(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "jobs.sqlite", max_queued=2)
    submit(store, "a")
    submit(store, "b")
    with pytest.raises(QueueFull):
        submit(store, "c")
    store.claim_next()
    submit(store, "c")


def test_a_full_disk_refuses_new_jobs_keeps_the_old_ones_and_works_again_with_room(tmp_path: Path) -> None:
    # given a disk on which no file may grow beyond 256 KiB
    store = JobStore(tmp_path / "jobs.sqlite", max_queued=10_000)
    acknowledged: list[str] = []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, unlimited[1]))
    try:
        # when jobs are queued until it is full
        with pytest.raises(JobStoreUnavailable, match=r"jobs\.sqlite"):
            acknowledged.extend(submit(store, f"out-{number}").id for number in range(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    # then those that were acknowledged are there, and there is room for the next one
    assert acknowledged
    assert [job.id for job in iter(store.claim_next, None)] == acknowledged
    assert submit(store, "next").state is JobState.QUEUED


def test_the_list_is_newest_first_and_continues_after_a_job(store: JobStore) -> None:
    ids = [submit(store, f"out-{number}").id for number in range(5)]
    first = store.list_jobs(limit=2)
    second = store.list_jobs(limit=3, after=first.jobs[-1].id)
    assert [job.id for job in (*first.jobs, *second.jobs)] == ids[::-1]
    assert (first.has_more, second.has_more) == (True, False)
    with pytest.raises(InvalidRequest, match="qjob-0"):
        store.list_jobs(limit=2, after="qjob-0")


def test_succeeded_outputs_are_the_checkpoints_that_are_still_there(store: JobStore, tmp_path: Path) -> None:
    for name in ("kept", "deleted", "failed"):
        job = submit(store, name)
        store.claim_next()
        MOVES[JobState.FAILED if name == "failed" else JobState.SUCCEEDED](store, job.id)
    for name in ("kept", "failed"):
        (tmp_path / name).mkdir()
    assert store.succeeded_outputs() == (tmp_path / "kept",)


def test_an_unknown_job_is_not_found(store: JobStore) -> None:
    for call in (store.get, store.request_cancel, store.finish_cancel):
        with pytest.raises(NotFound, match="qjob-0"):
            call("qjob-0")


@pytest.mark.parametrize("content", [b"this is no database, and longer than a header of one would be" * 20, b"SQLite"])
def test_a_file_that_is_no_job_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(content)
    with pytest.raises(JobStoreUnavailable, match=r"jobs\.sqlite"):
        JobStore(tmp_path / "jobs.sqlite")


def test_a_file_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(JobStoreUnavailable, match="version 7"):
        JobStore(tmp_path / "jobs.sqlite")


def test_whoever_cancels_again_is_told_the_same(store: JobStore) -> None:
    queued, running, over = submit(store, "a"), submit(store, "b"), submit(store, "c")
    cancelled = store.request_cancel(queued.id)
    assert store.request_cancel(queued.id) == cancelled
    store.claim_next()
    assert store.request_cancel(running.id) == store.request_cancel(running.id) == store.get(running.id)
    store.claim_next()
    store.succeed(over.id, None)
    with pytest.raises(Conflict, match="is succeeded"):
        store.request_cancel(over.id)


def test_every_option_of_a_job_is_kept(store: JobStore, tmp_path: Path) -> None:
    recipe = JobRecipe(
        source="owner/name",
        output=tmp_path / "out",
        bits=8,
        group_size="row",
        method="awq",
        calib="wikitext",
        calib_samples=8,
        calib_seqlen=128,
        seed=3,
        device="cuda",
        format="compressed-tensors",
        target_bpw=4.5,
        lm_head=8,
        max_kl=0.25,
        no_eval=True,
    )
    job = store.submit(recipe)
    store.close()
    assert JobStore(store.path).get(job.id).recipe == recipe
