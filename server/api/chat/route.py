"""POST /v1/chat/completions, streamed or not."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from server.api.auth import Tenant
from server.api.chat.schema import ChatBody
from server.api.chat.serving import chat_frames, prepare, whole_chat
from server.api.json_body import json_body
from server.api.services import ServicesOfApp
from server.api.sse import event_stream, whole_reply

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", response_model=None)
async def create_chat(
    request: Request, body: Annotated[ChatBody, Depends(json_body(ChatBody))], services: ServicesOfApp, tenant: Tenant
) -> Response:
    job = await prepare(body, services, tenant)
    if body.stream:
        return await event_stream(request, chat_frames(job, services))
    return await whole_reply(request, whole_chat(job, services))
