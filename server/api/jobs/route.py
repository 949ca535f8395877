"""The routes under /quantize. Translates between HTTP and QuantizeJobs, and decides nothing."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response, status

from server.api.jobs.schema import JobList, JobObject, QuantizeBody
from server.api.jobs.serving import QuantizeJobs
from server.api.json_body import json_body

DEFAULT_LIMIT = 20
MAX_LIMIT = 100

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


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, jobs: Jobs) -> JobObject:
    """Cancel a job. One that is running is cancelled a moment later, when its quantizer has ended."""
    return JobObject.from_record(await jobs.cancel(job_id))
