"""The job file of an older version, whose jobs go on."""

import sqlite3
from dataclasses import replace
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


# what version 2 had more
VERSION_2 = """
ALTER TABLE jobs ADD COLUMN seed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN format TEXT NOT NULL DEFAULT 'auto';
ALTER TABLE jobs ADD COLUMN target_bpw REAL;
ALTER TABLE jobs ADD COLUMN lm_head INTEGER;
ALTER TABLE jobs ADD COLUMN max_kl REAL;
ALTER TABLE jobs ADD COLUMN no_eval INTEGER NOT NULL DEFAULT 0;
CREATE TABLE job_events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job_id TEXT NOT NULL, kind TEXT NOT NULL, created_at INTEGER NOT NULL,
    phase TEXT, data TEXT NOT NULL
);
UPDATE jobs SET group_size = 'auto', seed = 5 WHERE id = 'qjob-2';
INSERT INTO job_events (job_id, kind, created_at, data) VALUES ('qjob-2', 'state', 300, '{"status": "queued"}');
PRAGMA user_version = 2;
"""


def test_the_jobs_of_version_2_leave_the_device_to_the_quantizer(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.executescript(VERSION_1)
        connection.executescript(VERSION_2)

    store = JobStore(tmp_path / "jobs.sqlite")

    assert (store.get("qjob-2").recipe.device, store.get("qjob-2").recipe.seed) == ("auto", 5)
    (waiting,) = store.events_after("qjob-2", 0)
    assert waiting.data == {"status": "queued"}
    later = store.submit(replace(store.get("qjob-2").recipe, output=tmp_path / "other", device="cuda"))
    store.close()
    assert JobStore(tmp_path / "jobs.sqlite").get(later.id).recipe.device == "cuda"


def test_the_jobs_of_an_older_version_are_taken_over(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.executescript(VERSION_1)

    store = JobStore(tmp_path / "jobs.sqlite")

    recipe = store.get("qjob-1").recipe
    assert (recipe.group_size, recipe.format, recipe.seed, recipe.no_eval) == (64, "auto", 0, False)
    assert recipe.device == "auto"
    assert store.get("qjob-2").recipe.group_size == "auto"
    (done,), (waiting,) = store.events_after("qjob-1", 0), store.events_after("qjob-2", 0)
    assert (done.is_last, done.created_at) == (True, 200)
    assert (waiting.data, waiting.created_at) == ({"status": "queued"}, 300)
    assert store.claim_next() == store.get("qjob-2")
    store.close()
    assert JobStore(tmp_path / "jobs.sqlite").get("qjob-2").state is JobState.RUNNING
