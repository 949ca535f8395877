"""POST /v1/completions, streamed or not."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.api.auth import Tenant
from server.api.completions.schema import CompletionBody
from server.api.completions.serving import completion_frames, prepare, whole_completion
from server.api.json_body import json_body
from server.api.services import ServicesOfApp
from server.api.sse import event_stream, whole_reply

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", response_model=None)
async def create_completion(
    request: Request,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
    services: ServicesOfApp,
    tenant: Tenant,
) -> Response:
    job = await prepare(body, services, tenant)
    if body.stream:
        return await event_stream(request, completion_frames(job, services))
    return await whole_reply(request, whole_completion(job, services))
