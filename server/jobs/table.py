"""The SQL table of jobs, and how its rows become JobRecords. Opens no file and changes no row."""

import sqlite3
from pathlib import Path

from server.jobs.record import JobProgress, JobRecipe, JobRecord, JobState

SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    source TEXT NOT NULL,
    output TEXT NOT NULL,
    bits INTEGER NOT NULL,
    group_size INTEGER,
    method TEXT NOT NULL,
    calib TEXT NOT NULL,
    calib_samples INTEGER,
    calib_seqlen INTEGER,
    idempotency_key TEXT UNIQUE,
    request_digest TEXT,
    created_at INTEGER NOT NULL,
    queued_at INTEGER,
    running_at INTEGER,
    succeeded_at INTEGER,
    failed_at INTEGER,
    cancelled_at INTEGER,
    cancel_requested_at INTEGER,
    num_starts INTEGER NOT NULL DEFAULT 0,
    phase TEXT,
    done INTEGER,
    total INTEGER,
    seconds_left REAL,
    error TEXT,
    report_json TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS one_active_job_per_output ON jobs (output) WHERE state IN ('queued', 'running');
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, number);
"""


def job_from_row(row: sqlite3.Row) -> JobRecord:
    stamps = {state: row[f"{state.value}_at"] for state in JobState}
    return JobRecord(
        id=row["id"],
        state=JobState(row["state"]),
        recipe=JobRecipe(
            source=row["source"],
            output=Path(row["output"]),
            bits=row["bits"],
            group_size=row["group_size"],
            method=row["method"],
            calib=row["calib"],
            calib_samples=row["calib_samples"],
            calib_seqlen=row["calib_seqlen"],
        ),
        created_at=row["created_at"],
        entered_at={state: stamp for state, stamp in stamps.items() if stamp is not None},
        cancel_requested_at=row["cancel_requested_at"],
        num_starts=row["num_starts"],
        progress=_progress_from_row(row),
        error=row["error"],
        report_json=row["report_json"],
    )


def _progress_from_row(row: sqlite3.Row) -> JobProgress | None:
    if row["phase"] is None:
        return None
    return JobProgress(row["phase"], row["done"], row["total"], row["seconds_left"])
