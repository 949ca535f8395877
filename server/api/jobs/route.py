"""The routes under /quantize. Translates between HTTP and QuantizeJobs, and decides nothing."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response, status

from server.api.cross_site import refuse_cross_site
from server.api.jobs.schema import JobList, JobObject, QuantizeBody
from server.api.jobs.serving import QuantizeJobs
from server.api.json_body import json_body
from server.api.sse import event_stream

DEFAULT_LIMIT = 20
MAX_LIMIT = 100
# the largest number that SQLite counts to
MAX_EVENT_ID = 2**63 - 1

router = APIRouter(prefix="/quantize", tags=["quantize"])


def quantize_jobs(request: Request) -> QuantizeJobs:
    """What server.app has put into the application's state."""
    jobs: QuantizeJobs = request.app.state.quantize_jobs
    return jobs


Jobs = Annotated[QuantizeJobs, Depends(quantize_jobs)]


@router.post("", status_code=status.HTTP_202_ACCEPTED)
async def create_job(
    body: Annotated[QuantizeBody, Depends(json_body(QuantizeBody))],
    jobs: Jobs,
    response: Response,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobObject:
    """Queue a quantization. The job is on disk before the answer leaves."""
    job = await jobs.submit(body, idempotency_key)
    response.headers["Location"] = f"/quantize/{job.id}"
    return JobObject.from_record(job)


@router.get("")
async def list_jobs(
    jobs: Jobs,
    after: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
) -> JobList:
    """The jobs, newest first."""
    return JobList.from_page(await jobs.list_jobs(limit=limit, after=after))


@router.get("/{job_id}")
async def get_job(job_id: str, jobs: Jobs) -> JobObject:
    """One job, with its progress or its report."""
    return JobObject.from_record(await jobs.get(job_id))


@router.get("/{job_id}/events", response_model=None)
async def follow_job(
    request: Request,
    job_id: str,
    jobs: Jobs,
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_EVENT_ID)] = None,
) -> Response:
    """What happens to a job, from its beginning or from behind the event of the header, as server-sent events."""
    if last_event_id is not None and await jobs.follower.has_ended_by(job_id, last_event_id):
        # what tells a browser not to come again
        return Response(status_code=status.HTTP_204_NO_CONTENT)
    return await event_stream(request, jobs.follower.frames(job_id, last_event_id or 0))


@router.post("/{job_id}/cancel", dependencies=[Depends(refuse_cross_site)])
async def cancel_job(job_id: str, jobs: Jobs) -> JobObject:
    """Cancel a job, or say again that it is. One that runs is cancelled a moment later, when its quantizer ends."""
    return JobObject.from_record(await jobs.cancel(job_id))
