"""Owns the job records: one SQLite file, and the only code that writes it. Never starts a process.

Every change is on disk before its method returns. Each change of state is one UPDATE that names the state it
comes from, so that of two contenders exactly one wins, whatever their threads or processes.
"""

import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from server.errors import Conflict, InvalidRequest, JobStoreUnavailable, NotFound, QueueFull
from server.jobs.event_log import EventKind, JobEvent, append_event, read_events
from server.jobs.record import TRANSITIONS, JobProgress, JobRecipe, JobRecord, JobState
from server.jobs.table import job_from_row, prepare_tables, row_from_recipe

BUSY_TIMEOUT_SECONDS = 10.0
# a queue this long is days of work on one box; more is a client in a loop
MAX_QUEUED = 100


@dataclass(frozen=True)
class IdempotencyKey:
    """A client's name for one submission, and the digest of its body: the same key never makes two jobs."""

    key: str
    request_digest: str


@dataclass(frozen=True)
class JobPage:
    """Some jobs, newest first, and whether older ones follow."""

    jobs: Sequence[JobRecord]
    has_more: bool


class JobStore:
    """The job file. Safe to share between threads, and between processes that open the same file.

    Every method raises JobStoreUnavailable when the file cannot be read or written.
    """

    def __init__(self, path: Path, *, max_queued: int = MAX_QUEUED) -> None:
        self.path = path
        self._max_queued = max_queued
        self._lock = threading.Lock()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            # an acknowledged job survives a power cut too; it costs one fsync a job, which nobody notices
            self._connection.execute("PRAGMA synchronous = FULL")
        with self._transaction() as connection:
            prepare_tables(connection, path)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def submit(self, recipe: JobRecipe, idempotency: IdempotencyKey | None = None) -> JobRecord:
        """Queue a job, or return the one that an earlier submission with the same key made.

        Raises Conflict for a key used with another body and for an output that another active job writes,
        QueueFull when too many jobs wait.
        """
        with self._transaction() as connection:
            earlier = _find_submission(connection, idempotency)
            if earlier is not None:
                return earlier
            self._check_room(connection)
            _check_output_is_free(connection, recipe.output)
            return _insert(connection, recipe, idempotency)

    def find_submission(self, idempotency: IdempotencyKey | None) -> JobRecord | None:
        """The job that an earlier submission with this key made. Raises Conflict when its body was another."""
        with self._reading() as connection:
            return _find_submission(connection, idempotency)

    def get(self, job_id: str) -> JobRecord:
        """Raises NotFound for an unknown id."""
        with self._reading() as connection:
            return job_from_row(_find(connection, job_id))

    def list_jobs(self, *, limit: int, after: str | None = None) -> JobPage:
        """Up to `limit` jobs, newest first, from behind the job `after`. Raises InvalidRequest for an unknown one."""
        with self._reading() as connection:
            query = "SELECT * FROM jobs WHERE number < ? ORDER BY number DESC LIMIT ?"
            rows = connection.execute(query, (_number_of(connection, after), limit + 1)).fetchall()
        return JobPage([job_from_row(row) for row in rows[:limit]], has_more=len(rows) > limit)

    def succeeded_outputs(self) -> tuple[Path, ...]:
        """The checkpoints that jobs have made and that are still there, newest first, each once."""
        query = "SELECT output FROM jobs WHERE state = 'succeeded' GROUP BY output ORDER BY MAX(number) DESC"
        with self._reading() as connection:
            rows = connection.execute(query).fetchall()
        return tuple(output for row in rows if (output := Path(row["output"])).is_dir())

    def running_jobs(self) -> tuple[JobRecord, ...]:
        with self._reading() as connection:
            rows = connection.execute("SELECT * FROM jobs WHERE state = 'running' ORDER BY number").fetchall()
        return tuple(job_from_row(row) for row in rows)

    def claim_next(self) -> JobRecord | None:
        """Oldest queued → running, with one more start on its account. None when no job is queued."""
        with self._transaction() as connection:
            query = "SELECT id FROM jobs WHERE state = 'queued' ORDER BY number LIMIT 1"
            row = connection.execute(query).fetchone()
            if row is None:
                return None
            return _move(connection, row["id"], (JobState.QUEUED, JobState.RUNNING), "num_starts = num_starts + 1")

    def record_progress(self, job_id: str, progress: JobProgress) -> None:
        """Note how far a running job is; without effect on a job that no longer runs."""
        with self._transaction() as connection:
            if _is_running(connection, job_id):
                connection.execute(
                    "UPDATE jobs SET phase = ?, done = ?, total = ?, seconds_left = ? WHERE id = ?",
                    (progress.phase, progress.done, progress.total, progress.seconds_left, job_id),
                )
                append_event(connection, job_id, EventKind.PROGRESS, vars(progress))

    def record_event(self, job_id: str, kind: EventKind, data: Mapping[str, object]) -> None:
        """Note what a running job says; without effect on a job that no longer runs."""
        with self._transaction() as connection:
            if _is_running(connection, job_id):
                append_event(connection, job_id, kind, data)

    def events_after(self, job_id: str, number: int) -> tuple[JobEvent, ...]:
        """What has happened to a job since the event of that number, the oldest first, some of it if it is much."""
        with self._reading() as connection:
            return read_events(connection, job_id, number)

    def request_cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job at once; note the wish on a running one, whose supervisor stops the quantizer.

        Whoever asks again is told the same. Raises NotFound for an unknown job, Conflict for one that ended otherwise.
        """
        with self._transaction() as connection:
            job = job_from_row(_find(connection, job_id))
            if job.state is JobState.CANCELLED or (job.state is JobState.RUNNING and job.cancel_requested_at):
                return job
            now = int(time.time())
            query = "UPDATE jobs SET cancel_requested_at = ? WHERE id = ? RETURNING *"
            row = connection.execute(query, (now, job_id)).fetchone()
            if job.state is JobState.RUNNING:
                wish = {"status": job.state.value, "cancel_requested_at": now}
                append_event(connection, job_id, EventKind.STATE, wish)
                return job_from_row(row)
            return _move(connection, job_id, (JobState.QUEUED, JobState.CANCELLED))

    def succeed(self, job_id: str, report_json: str | None) -> JobRecord:
        """running → succeeded. Raises Conflict when the job is in another state; so do the three below."""
        with self._transaction() as connection:
            return _move(connection, job_id, (JobState.RUNNING, JobState.SUCCEEDED), "report_json = ?", report_json)

    def fail(self, job_id: str, error: str) -> JobRecord:
        """running → failed; `error` is a sentence for the client."""
        with self._transaction() as connection:
            return _move(connection, job_id, (JobState.RUNNING, JobState.FAILED), "error = ?", error)

    def finish_cancel(self, job_id: str) -> JobRecord:
        """running → cancelled, once the quantizer is gone."""
        with self._transaction() as connection:
            return _move(connection, job_id, (JobState.RUNNING, JobState.CANCELLED))

    def requeue(self, job_id: str, *, num_starts: int) -> JobRecord:
        """running → queued, to start over, with `num_starts` starts on its account."""
        reset = "num_starts = ?, phase = NULL, done = NULL, total = NULL, seconds_left = NULL"
        with self._transaction() as connection:
            return _move(connection, job_id, (JobState.RUNNING, JobState.QUEUED), reset, num_starts)

    def _check_room(self, connection: sqlite3.Connection) -> None:
        num_queued = connection.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
        if num_queued >= self._max_queued:
            raise QueueFull(f"{num_queued} quantization jobs are queued, the most there may be; wait, or cancel some")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._explained(), self._lock:
            yield self._connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained(), self._lock, self._connection as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JobStoreUnavailable(f"the job file {self.path} cannot be used: {error}") from error


def _find(connection: sqlite3.Connection, job_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise NotFound(f"there is no quantization job {job_id!r}", code="job_not_found")
    return row


def _is_running(connection: sqlite3.Connection, job_id: str) -> bool:
    query = "SELECT 1 FROM jobs WHERE id = ? AND state = 'running'"
    return connection.execute(query, (job_id,)).fetchone() is not None


def _number_of(connection: sqlite3.Connection, job_id: str | None) -> int:
    """The running number of a job; for None, one that is larger than any."""
    if job_id is None:
        return 2**62
    row = connection.execute("SELECT number FROM jobs WHERE id = ?", (job_id,)).fetchone()
    if row is None:
        raise InvalidRequest(f"after must be the id of a job, and there is no job {job_id!r}", param="after")
    return int(row["number"])


def _move(
    connection: sqlite3.Connection,
    job_id: str,
    step: tuple[JobState, JobState],
    changes: str | None = None,
    *values: str | int | None,
) -> JobRecord:
    """Compare and set: one statement that takes a job from the first state of `step` to the second, or fails."""
    source, target = step
    if target not in TRANSITIONS[source]:
        raise AssertionError(f"no job goes from {source.value} to {target.value}")
    assignments = ", ".join(filter(None, ["state = ?", f"{target.value}_at = ?", changes]))
    query = f"UPDATE jobs SET {assignments} WHERE id = ? AND state = ? RETURNING *"
    now = int(time.time())
    row = connection.execute(query, (target.value, now, *values, job_id, source.value)).fetchone()
    if row is not None:
        append_event(connection, job_id, EventKind.STATE, {"status": target.value})
        return job_from_row(row)
    state = _find(connection, job_id)["state"]
    raise Conflict(f"job {job_id} is {state}, and only a {source.value} one can become {target.value}")


def _insert(connection: sqlite3.Connection, recipe: JobRecipe, idempotency: IdempotencyKey | None) -> JobRecord:
    now = int(time.time())
    values = {
        "id": f"qjob-{uuid.uuid4().hex}",
        "state": JobState.QUEUED.value,
        **row_from_recipe(recipe),
        "idempotency_key": idempotency.key if idempotency else None,
        "request_digest": idempotency.request_digest if idempotency else None,
        "created_at": now,
        "queued_at": now,
    }
    columns = ", ".join(values)
    places = ", ".join(f":{name}" for name in values)
    row = connection.execute(f"INSERT INTO jobs ({columns}) VALUES ({places}) RETURNING *", values).fetchone()
    append_event(connection, row["id"], EventKind.STATE, {"status": JobState.QUEUED.value})
    return job_from_row(row)


def _find_submission(connection: sqlite3.Connection, idempotency: IdempotencyKey | None) -> JobRecord | None:
    if idempotency is None:
        return None
    row = connection.execute("SELECT * FROM jobs WHERE idempotency_key = ?", (idempotency.key,)).fetchone()
    if row is None:
        return None
    if row["request_digest"] != idempotency.request_digest:
        raise Conflict(
            f"Idempotency-Key {idempotency.key!r} was used before with another body, for job {row['id']}; "
            "send that body again, or a new key",
            code="idempotency_key_reused",
        )
    return job_from_row(row)


def _check_output_is_free(connection: sqlite3.Connection, output: Path) -> None:
    query = "SELECT id, state FROM jobs WHERE output = ? AND state IN ('queued', 'running')"
    row = connection.execute(query, (str(output),)).fetchone()
    if row is not None:
        raise Conflict(
            f"job {row['id']} is {row['state']} and writes {output.name!r}; choose another output, or cancel that job",
            param="output",
            code="output_exists",
        )
