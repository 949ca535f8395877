"""What has happened to a job, as the store keeps it: in order, readable from any place, of a phase the last count."""

from pathlib import Path

import pytest

from server.jobs.event_log import MAX_READ, EventKind
from server.jobs.record import JobProgress, JobRecord
from server.jobs.store import JobStore
from tests.server.jobs.recipes import make_recipe


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(tmp_path / "jobs.sqlite")


def submit(store: JobStore, output: str = "out") -> JobRecord:
    return store.submit(make_recipe(store.path.parent / output))


def test_what_happens_to_a_job_can_be_read_from_any_place_in_order(store: JobStore) -> None:
    # given a job that was queued, ran, was asked to end, and failed, beside another one
    job = submit(store)
    submit(store, "other")
    store.claim_next()
    store.record_event(job.id, EventKind.NOTICE, {"message": "resuming at block 3 of 30"})
    store.record_progress(job.id, JobProgress("load", 1, 1, None))
    for done in range(3):
        store.record_progress(job.id, JobProgress("blocks", done, 30, None))
    store.record_event(job.id, EventKind.BLOCK, {"block": "model.layers.0"})
    store.request_cancel(job.id)
    store.request_cancel(job.id)
    store.fail(job.id, "the disk is full")

    # when its events are read, then they are there in order, of each phase the last count
    events = store.events_after(job.id, 0)
    assert [(event.kind.value, event.data.get("status", event.data.get("phase"))) for event in events] == [
        ("state", "queued"),
        ("state", "running"),
        ("notice", None),
        ("progress", "load"),
        ("progress", "blocks"),
        ("block", None),
        ("state", "running"),
        ("state", "failed"),
    ]
    assert events[4].data == {"phase": "blocks", "done": 2, "total": 30, "seconds_left": None}
    assert events[6].data["cancel_requested_at"] == store.get(job.id).cancel_requested_at
    assert [event.is_last for event in events] == [False] * 7 + [True]

    # and whoever has seen some of them is told the rest
    assert store.events_after(job.id, events[3].number) == events[4:]


def test_progress_that_is_told_again_comes_after_what_was_seen(store: JobStore) -> None:
    job = submit(store)
    store.claim_next()
    store.record_progress(job.id, JobProgress("blocks", 1, 30, None))
    seen = store.events_after(job.id, 0)[-1].number
    store.record_progress(job.id, JobProgress("blocks", 2, 30, None))
    (news,) = store.events_after(job.id, seen)
    assert news.data["done"] == 2


def test_nothing_is_noted_after_the_end_of_a_job(store: JobStore) -> None:
    job = submit(store)
    store.claim_next()
    store.succeed(job.id, None)
    store.record_event(job.id, EventKind.NOTICE, {"message": "late"})
    store.record_progress(job.id, JobProgress("blocks", 30, 30, 0.0))
    assert store.events_after(job.id, 0)[-1].is_last


def test_many_events_are_read_in_parts(store: JobStore) -> None:
    job = submit(store)
    store.claim_next()
    for number in range(MAX_READ):
        store.record_event(job.id, EventKind.BLOCK, {"block": f"model.layers.{number}"})
    first = store.events_after(job.id, 0)
    assert len(first) == MAX_READ
    assert len(store.events_after(job.id, first[-1].number)) == 2
