"""The events of one job as frames, from any place in its past to its end. Reads the store, and changes nothing.

A listener holds no queue: it asks the store for what is new as fast as its client reads, and of progress the store
keeps only the last count of a phase. So a slow client costs no memory, and misses nothing that matters.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass

from server.api.jobs.schema import JobObject
from server.api.sse import HEARTBEAT, RECONNECT, numbered_frame
from server.errors import QueueFull, ShuttingDown
from server.jobs.event_log import JobEvent
from server.jobs.news import JobNews
from server.jobs.store import JobStore


@dataclass(frozen=True)
class Pace:
    """How often a listener looks. poll_seconds: for what another server does with the job file, of which no news comes.

    rest_seconds: between two looks, whatever the news. heartbeat_seconds: a stream says at least so often that it is
    alive; proxies close silent ones.
    """

    poll_seconds: float = 1.0
    rest_seconds: float = 0.2
    heartbeat_seconds: float = 15.0


class JobFollower:
    """Follows the jobs of a store for up to max_listeners at once, so that connections are left for other requests."""

    def __init__(self, store: JobStore, news: JobNews, *, pace: Pace = Pace(), max_listeners: int = 256) -> None:
        self._store = store
        self._news = news
        self._pace = pace
        self._max_listeners = max_listeners
        self._num_listeners = 0

    async def frames(self, job_id: str, after: int) -> AsyncGenerator[bytes, None]:
        """Every event of the job behind the number `after`; the last one has the whole job.

        Raises NotFound and QueueFull before the first frame, ShuttingDown when the server ends before the job.
        """
        if self._num_listeners >= self._max_listeners:
            raise QueueFull(f"{self._num_listeners} clients follow jobs, the most there may be; get the job instead")
        self._num_listeners += 1
        try:
            async with aclosing(self._frames(job_id, after)) as frames:
                async for frame in frames:
                    yield frame
        finally:
            self._num_listeners -= 1

    async def has_ended_by(self, job_id: str, number: int) -> bool:
        """Whether the event of that number was the job's last. Raises NotFound for an unknown job."""
        job = await asyncio.to_thread(self._store.get, job_id)
        return job.state.is_terminal and not await asyncio.to_thread(self._store.events_after, job_id, number)

    async def _frames(self, job_id: str, after: int) -> AsyncGenerator[bytes, None]:
        await asyncio.to_thread(self._store.get, job_id)
        yield RECONNECT
        last_frame_s = time.monotonic()
        while True:
            upcoming = self._news.upcoming()
            events = await asyncio.to_thread(self._store.events_after, job_id, after)
            for event in events:
                yield await self._frame(job_id, event)
                after, last_frame_s = event.number, time.monotonic()
                if event.is_last:
                    return
            if events:
                # there may be more at once
                await asyncio.sleep(self._pace.rest_seconds)
                continue
            if self._news.is_closed:
                raise ShuttingDown("the server is shutting down; ask again, with the last id as Last-Event-ID")
            if time.monotonic() - last_frame_s >= self._pace.heartbeat_seconds:
                yield HEARTBEAT
                last_frame_s = time.monotonic()
            with suppress(TimeoutError):
                await asyncio.wait_for(upcoming.wait(), self._pace.poll_seconds)

    async def _frame(self, job_id: str, event: JobEvent) -> bytes:
        data: object = event.data
        if event.is_last:
            data = JobObject.from_record(await asyncio.to_thread(self._store.get, job_id)).model_dump(mode="json")
        payload = {
            "id": event.number,
            "object": "quantization.job.event",
            "job_id": job_id,
            "created_at": event.created_at,
            "type": event.kind.value,
            "data": data,
        }
        return numbered_frame(event.number, payload)
