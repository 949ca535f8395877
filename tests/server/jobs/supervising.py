"""A supervisor that runs the scripted quantizer, and waiting for what it does."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from server.jobs.record import JobRecord
from server.jobs.store import JobStore
from server.jobs.supervisor import JobSupervisor

SCRIPTED_QUANTIZER = (sys.executable, str(Path(__file__).with_name("scripted_quantizer.py")))
DEADLINE_SECONDS = 30.0


def scripted_supervisor(store: JobStore, *, grace_seconds: float = 10.0) -> JobSupervisor:
    return JobSupervisor(store, command=SCRIPTED_QUANTIZER, poll_seconds=0.05, grace_seconds=grace_seconds)


@asynccontextmanager
async def supervised(store: JobStore, *, grace_seconds: float = 10.0) -> AsyncIterator[JobSupervisor]:
    supervisor = scripted_supervisor(store, grace_seconds=grace_seconds)
    supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


async def reaches(store: JobStore, job_id: str, condition: Callable[[JobRecord], bool]) -> JobRecord:
    """The job, as soon as the condition holds for it; TimeoutError when the deadline passes first."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition(job := store.get(job_id)):
            await asyncio.sleep(0.02)
    return job


async def ends(store: JobStore, job_id: str) -> JobRecord:
    return await reaches(store, job_id, lambda job: job.state.is_terminal)


async def reports_progress(store: JobStore, job_id: str) -> JobRecord:
    return await reaches(store, job_id, lambda job: job.progress is not None)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
