"""What the quantization routes do: checks against the file system, then the store. Knows nothing of HTTP."""

import asyncio
import hashlib
from collections.abc import Callable

from server.api.jobs.following import JobFollower
from server.api.jobs.places import JobPlaces
from server.api.jobs.schema import QuantizeBody
from server.jobs.record import JobRecord
from server.jobs.store import IdempotencyKey, JobPage, JobStore


class QuantizeJobs:
    """The store as the routes see it: never on the event loop's thread, the supervisor told of what is new.

    follower: what streams the events of jobs.
    """

    def __init__(
        self, store: JobStore, places: JobPlaces, wake_supervisor: Callable[[], None], follower: JobFollower
    ) -> None:
        self.follower = follower
        self._store = store
        self._places = places
        self._wake_supervisor = wake_supervisor

    async def submit(self, body: QuantizeBody, key: str | None) -> JobRecord:
        """Raises InvalidRequest, Conflict, QueueFull; see JobPlaces.recipe_from_body and JobStore.submit."""
        job = await asyncio.to_thread(self._submit, body, key)
        self._wake_supervisor()
        return job

    async def get(self, job_id: str) -> JobRecord:
        return await asyncio.to_thread(self._store.get, job_id)

    async def list_jobs(self, *, limit: int, after: str | None) -> JobPage:
        return await asyncio.to_thread(lambda: self._store.list_jobs(limit=limit, after=after))

    async def cancel(self, job_id: str) -> JobRecord:
        """Raises NotFound, and Conflict for a job that ended otherwise."""
        job = await asyncio.to_thread(self._store.request_cancel, job_id)
        self._wake_supervisor()
        return job

    def _submit(self, body: QuantizeBody, key: str | None) -> JobRecord:
        idempotency = IdempotencyKey(key, digest(body)) if key is not None else None
        # before the checks: the job that this key made may have written its output since
        earlier = self._store.find_submission(idempotency)
        if earlier is not None:
            return earlier
        return self._store.submit(self._places.recipe_from_body(body), idempotency)


def digest(body: QuantizeBody) -> str:
    """The same for bodies that mean the same, whatever the order of their fields and the defaults they leave out."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()
