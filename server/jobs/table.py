"""The SQL tables of the jobs, and how rows become JobRecords and recipes become rows. Opens no file."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from server.errors import JobStoreUnavailable
from server.jobs.record import JobProgress, JobRecipe, JobRecord, JobState

SCHEMA_VERSION = 3

SCHEMA = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    source TEXT NOT NULL,
    output TEXT NOT NULL,
    bits INTEGER NOT NULL,
    group_size NOT NULL,
    method TEXT NOT NULL,
    calib TEXT NOT NULL,
    calib_samples INTEGER,
    calib_seqlen INTEGER,
    seed INTEGER NOT NULL,
    device TEXT NOT NULL,
    format TEXT NOT NULL,
    target_bpw REAL,
    lm_head INTEGER,
    max_kl REAL,
    no_eval INTEGER NOT NULL,
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
CREATE UNIQUE INDEX one_active_job_per_output ON jobs (output) WHERE state IN ('queued', 'running');
CREATE INDEX jobs_by_state ON jobs (state, number)
"""

# phase: of progress, which takes the place of what was said of that phase before
EVENTS = """
CREATE TABLE job_events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('state', 'progress', 'notice', 'block')),
    created_at INTEGER NOT NULL,
    phase TEXT,
    data TEXT NOT NULL
);
CREATE INDEX events_of_job ON job_events (job_id, number)
"""

# version 1 had fewer options, none for a group size left open, and no events
FROM_VERSION_1 = """
ALTER TABLE jobs ADD COLUMN seed INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN format TEXT NOT NULL DEFAULT 'auto';
ALTER TABLE jobs ADD COLUMN target_bpw REAL;
ALTER TABLE jobs ADD COLUMN lm_head INTEGER;
ALTER TABLE jobs ADD COLUMN max_kl REAL;
ALTER TABLE jobs ADD COLUMN no_eval INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET group_size = coalesce(group_size, 'auto');
"""
# version 2 had no choice of a device: the quantizer ran on the CPU
FROM_VERSION_2 = "ALTER TABLE jobs ADD COLUMN device TEXT NOT NULL DEFAULT 'auto'"
STATES_AS_EVENTS = """
INSERT INTO job_events (job_id, kind, created_at, data)
SELECT id, 'state', coalesce(succeeded_at, failed_at, cancelled_at, running_at, queued_at, created_at),
    json_object('status', state) FROM jobs ORDER BY number
"""
STEPS_FROM = {
    0: (SCHEMA, EVENTS),
    1: (FROM_VERSION_1, FROM_VERSION_2, EVENTS, STATES_AS_EVENTS),
    2: (FROM_VERSION_2,),
}


def prepare_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables, or bring those of an older version up to this one. Call it within a transaction.

    path: the job file, for the sentence of the JobStoreUnavailable that a file of another version raises.
    """
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == SCHEMA_VERSION:
        return
    if version not in STEPS_FROM:
        raise JobStoreUnavailable(
            f"{path} holds jobs in version {version}, and this awq-serve reads version {SCHEMA_VERSION}; "
            "run the awq-serve that wrote it, or move the file away"
        )
    for statement in ";".join(STEPS_FROM[version]).split(";"):
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def row_from_recipe(recipe: JobRecipe) -> Mapping[str, object]:
    """The columns of a recipe: its fields."""
    return {**vars(recipe), "output": str(recipe.output)}


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
            seed=row["seed"],
            device=row["device"],
            format=row["format"],
            target_bpw=row["target_bpw"],
            lm_head=row["lm_head"],
            max_kl=row["max_kl"],
            no_eval=bool(row["no_eval"]),
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
