"""Runs the queued jobs, one quantizer process at a time. Changes a job only through the store.

Servers that share one job file are safe together: whoever holds the runner lock runs the jobs of all of them, and
when that server ends, another takes over.
"""

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from server.errors import JobStoreUnavailable
from server.jobs.event_log import EventKind
from server.jobs.events import BlockEvent, ProgressEvent, WorkEvent
from server.jobs.news import JobNews
from server.jobs.quantizer import QuantizerExit, QuantizerProcess
from server.jobs.record import JobProgress, JobRecipe, JobRecord
from server.jobs.runner_lock import RunnerLock
from server.jobs.store import JobStore

QUANTIZE_COMMAND = (sys.executable, "-m", "quant", "quantize")
POLL_SECONDS = 1.0
GRACE_SECONDS = 10.0
# a job whose server died under it this often is taken to be what kills it
MAX_STARTS = 3

Answer = TypeVar("Answer")
log = structlog.get_logger(__name__)


class JobSupervisor:
    """One asyncio task that claims, runs and settles jobs. `start` it on the thread that lives as long as the server.

    command: what starts a quantizer; the job's arguments are appended. poll_seconds: how often it looks for what
    other servers on the same file have queued or cancelled. grace_seconds: from the first signal to SIGKILL.
    news: told of all that happens to jobs here, and closed when the supervisor is to stop.
    """

    def __init__(
        self,
        store: JobStore,
        *,
        command: Sequence[str] = QUANTIZE_COMMAND,
        poll_seconds: float = POLL_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._store = store
        self._command = command
        self._poll_seconds = poll_seconds
        self._grace_seconds = grace_seconds
        self.news = JobNews()
        self._woken = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="job-supervisor")
        self._task.add_done_callback(_log_crash)

    def wake(self) -> None:
        """Look at the store now: a job was queued or is to be cancelled. Call it on the event loop's thread."""
        self._woken.set()
        self.news.tell()

    async def stop(self) -> None:
        """End the running quantizer and queue its job again for the next start of a server."""
        self._stopping = True
        self._woken.set()
        self.news.close()
        if self._task is not None:
            try:
                await self._task
            except JobStoreUnavailable as error:
                # the job stays marked as running, and the next start of a server recovers it
                log.error("a job could not be queued again", error=error.message)

    async def _run(self) -> None:
        lock = RunnerLock(self._store.path)
        try:
            while not await self._persist(lock.acquire):
                await self._wait_for_news()
                if self._stopping:
                    return
            await self._persist(self._recover)
            while not self._stopping:
                job = await self._persist(self._store.claim_next)
                if job is None:
                    await self._wait_for_news()
                else:
                    await self._run_job(job)
        finally:
            lock.release()

    async def _run_job(self, job: JobRecord) -> None:
        log.info("quantization started", job_id=job.id, source=job.recipe.source, output=str(job.recipe.output))
        try:
            quantizer = await QuantizerProcess.start([*self._command, *quantizer_arguments(job.recipe)])
        except OSError as error:
            reason = f"the quantizer could not be started: {error}"
            await self._persist(lambda: self._store.fail(job.id, reason))
            return

        async def note(event: WorkEvent) -> None:
            try:
                await asyncio.to_thread(self._record, job.id, event)
            except JobStoreUnavailable as error:
                log.warning("progress not recorded", job_id=job.id, error=error.message)
            self.news.tell()

        following = asyncio.create_task(quantizer.follow(note))
        while not following.done():
            await self._wait_for_news(following)
            if following.done():
                break
            is_cancelled = await self._is_cancel_requested(job)
            if is_cancelled or self._stopping:
                # at SIGTERM the quantizer keeps its finished blocks for the next start, at SIGINT it removes them
                await quantizer.stop(signal.SIGINT if is_cancelled else signal.SIGTERM, self._grace_seconds)
                break
        ended = await following
        settled = await self._persist(lambda: self._settle(job, ended))
        log.info("quantization ended", job_id=job.id, state=settled.state.value, error=settled.error)

    def _record(self, job_id: str, event: WorkEvent) -> None:
        if isinstance(event, ProgressEvent):
            progress = JobProgress(event.phase, event.done, event.total, event.seconds_left)
            self._store.record_progress(job_id, progress)
        else:
            kind = EventKind.BLOCK if isinstance(event, BlockEvent) else EventKind.NOTICE
            self._store.record_event(job_id, kind, event.fields())

    def _recover(self) -> None:
        """Settle what a server that died left as running. Its quantizers died with it."""
        for job in self._store.running_jobs():
            if job.recipe.output.is_dir():
                # a checkpoint appears by one rename, so one that is there is whole
                settled = self._store.succeed(job.id, report_json=None)
            elif job.cancel_requested_at is not None:
                settled = self._store.finish_cancel(job.id)
            elif job.num_starts >= MAX_STARTS:
                reason = f"the server died {job.num_starts} times while this job ran, so it is not started again"
                settled = self._store.fail(job.id, reason)
            else:
                settled = self._store.requeue(job.id, num_starts=job.num_starts)
            log.warning("job recovered", job_id=job.id, state=settled.state.value)

    def _settle(self, job: JobRecord, ended: QuantizerExit) -> JobRecord:
        """Write down how a job ended. A checkpoint that is there counts, even when its cancellation was asked for."""
        if ended.returncode == 0 and job.recipe.output.is_dir():
            return self._store.succeed(job.id, ended.report_json)
        if self._store.get(job.id).cancel_requested_at is not None:
            return self._store.finish_cancel(job.id)
        if self._stopping:
            # nothing went wrong, so this start does not count
            return self._store.requeue(job.id, num_starts=job.num_starts - 1)
        return self._store.fail(job.id, ended.describe())

    async def _is_cancel_requested(self, job: JobRecord) -> bool:
        try:
            current = await asyncio.to_thread(self._store.get, job.id)
        except JobStoreUnavailable as error:
            # asked again at the next poll
            log.warning("cancellation not known", job_id=job.id, error=error.message)
            return False
        return current.cancel_requested_at is not None

    async def _persist(self, change: Callable[[], Answer]) -> Answer:
        """Do it off the event loop, again and again until the store answers; when stopping, only once."""
        while True:
            try:
                answer = await asyncio.to_thread(change)
            except JobStoreUnavailable as error:
                log.error("job store unavailable", error=error.message)
                if self._stopping:
                    raise
                await self._wait_for_news()
            else:
                self.news.tell()
                return answer

    async def _wait_for_news(self, *others: asyncio.Task[QuantizerExit]) -> None:
        """Until `wake`, the end of one of the other tasks, or the time of a poll."""
        news = asyncio.create_task(self._woken.wait())
        await asyncio.wait({news, *others}, timeout=self._poll_seconds, return_when=asyncio.FIRST_COMPLETED)
        news.cancel()
        self._woken.clear()


def quantizer_arguments(recipe: JobRecipe) -> list[str]:
    """The command line of one job, as `awq-serve quantize` takes it."""
    options = {
        "--bits": recipe.bits,
        "--group-size": recipe.group_size,
        "--format": recipe.format,
        "--target-bpw": recipe.target_bpw,
        "--lm-head": recipe.lm_head,
        "--method": recipe.method,
        "--calib": recipe.calib,
        "--calib-samples": recipe.calib_samples,
        "--calib-seqlen": recipe.calib_seqlen,
        "--seed": recipe.seed,
        "--device": recipe.device,
        "--max-kl": recipe.max_kl,
        "--progress-format": "json",
    }
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    flags = ["--verbose", *(["--no-eval"] if recipe.no_eval else [])]
    return [recipe.source, str(recipe.output), *given, *flags]


def _log_crash(task: asyncio.Task[None]) -> None:
    """A bug in the supervisor must be seen when it happens, not when the server stops."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the job supervisor ended", error=repr(error))
