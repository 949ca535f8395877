"""What has happened to each job, in order: the rows of job_events. Opens no file and begins no transaction.

The log of a job is bounded by its phases and blocks: of a phase only the last count is kept.
"""

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from server.jobs.record import JobState

# a reader asks again after so many: a large mixture of experts has much to say of its blocks
MAX_READ = 256


class EventKind(Enum):
    STATE = "state"
    PROGRESS = "progress"
    NOTICE = "notice"
    BLOCK = "block"


@dataclass(frozen=True)
class JobEvent:
    """One thing that happened to a job. number: rises over all jobs, and is never used twice. created_at: in s."""

    number: int
    kind: EventKind
    created_at: int
    data: Mapping[str, object]

    @property
    def is_last(self) -> bool:
        """Whether nothing more happens to the job."""
        return self.kind is EventKind.STATE and JobState(self.data["status"]).is_terminal


def append_event(connection: sqlite3.Connection, job_id: str, kind: EventKind, data: Mapping[str, object]) -> None:
    """Progress takes the place of what was said of its phase before."""
    phase = data["phase"] if kind is EventKind.PROGRESS else None
    if phase is not None:
        connection.execute("DELETE FROM job_events WHERE job_id = ? AND phase = ?", (job_id, phase))
    connection.execute(
        "INSERT INTO job_events (job_id, kind, created_at, phase, data) VALUES (?, ?, ?, ?, ?)",
        (job_id, kind.value, int(time.time()), phase, json.dumps(data)),
    )


def read_events(connection: sqlite3.Connection, job_id: str, after: int) -> tuple[JobEvent, ...]:
    """The first MAX_READ events of a job behind the one of that number."""
    query = "SELECT * FROM job_events WHERE job_id = ? AND number > ? ORDER BY number LIMIT ?"
    rows = connection.execute(query, (job_id, after, MAX_READ)).fetchall()
    return tuple(
        JobEvent(row["number"], EventKind(row["kind"]), row["created_at"], json.loads(row["data"])) for row in rows
    )
