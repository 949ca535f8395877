"""The job file of an older version, whose jobs go on."""

import sqlite3
from pathlib import Path

from server.jobs.record import JobState
from server.jobs.store import JobStore

# as an awq-serve before the options and the events wrote it
VERSION_1 = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, state TEXT NOT NULL, source TEXT NOT NULL,
    output TEXT NOT NULL, bits INTEGER NOT NULL, group_size INTEGER, method TEXT NOT NULL, calib TEXT NOT NULL,
    calib_samples INTEGER, calib_seqlen INTEGER, idempotency_key TEXT UNIQUE, request_digest TEXT,
    created_at INTEGER NOT NULL, queued_at INTEGER, running_at INTEGER, succeeded_at INTEGER, failed_at INTEGER,
    cancelled_at INTEGER, cancel_requested_at INTEGER, num_starts INTEGER NOT NULL DEFAULT 0, phase TEXT, done INTEGER,
    total INTEGER, seconds_left REAL, error TEXT, report_json TEXT
);
INSERT INTO jobs (id, state, source, output, bits, group_size, method, calib, created_at, queued_at, succeeded_at)
VALUES ('qjob-1', 'succeeded', 'a', '/a', 4, 64, 'awq', 'self', 100, 100, 200),
    ('qjob-2', 'queued', 'b', '/b', 4, NULL, 'awq', 'self', 300, 300, NULL);
PRAGMA user_version = 1;
"""


def test_the_jobs_of_an_older_version_are_taken_over(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.executescript(VERSION_1)

    store = JobStore(tmp_path / "jobs.sqlite")

    recipe = store.get("qjob-1").recipe
    assert (recipe.group_size, recipe.format, recipe.seed, recipe.no_eval) == (64, "auto", 0, False)
    assert store.get("qjob-2").recipe.group_size == "auto"
    (done,), (waiting,) = store.events_after("qjob-1", 0), store.events_after("qjob-2", 0)
    assert (done.is_last, done.created_at) == (True, 200)
    assert (waiting.data, waiting.created_at) == ({"status": "queued"}, 300)
    assert store.claim_next() == store.get("qjob-2")
    store.close()
    assert JobStore(tmp_path / "jobs.sqlite").get("qjob-2").state is JobState.RUNNING
