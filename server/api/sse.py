"""Server-sent events: the only place that writes `data:` frames, and the listener for clients that went away."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from server.api.errors import CLIENT_CLOSED_REQUEST, error_bytes, note_unexpected
from server.errors import ServerError

Answer = TypeVar("Answer")

DONE = b"data: [DONE]\n\n"
# a comment, which clients skip, and how long they wait before they come again after a connection that broke
HEARTBEAT = b": still here\n\n"
RECONNECT = b"retry: 2000\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def frame(payload: object) -> bytes:
    """One event with a JSON payload."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def numbered_frame(number: int, payload: object) -> bytes:
    """One event that a client can name as the last it has seen, in the header Last-Event-ID."""
    return b"id: %d\n" % number + frame(payload)


class EventStream(Response):
    """Sends frames as they come, then [DONE]. An error on the way becomes a frame of its own before [DONE].

    However it ends, and when the client goes away first, the frames' generator is closed before the call returns.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], first: bytes) -> None:
        super().__init__(headers=HEADERS, media_type="text/event-stream")
        del self.headers["content-length"]
        self._first = first
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._send_frames(scope, send))
        finally:
            await self._frames.aclose()

    async def _send_frames(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for content in self._frames:
                await send({"type": "http.response.body", "body": content, "more_body": True})
        except Exception as error:
            known = error if isinstance(error, ServerError) else note_unexpected(scope, error)
            content = b"data: " + error_bytes(known) + b"\n\n"
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def event_stream(request: Request, frames: AsyncGenerator[bytes, None]) -> Response:
    """A response that starts with the first frame, so that what fails before it still gets its own status code."""
    first = await unless_disconnected(request.receive, _next_frame(frames))
    if first is None:
        await frames.aclose()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return EventStream(frames, first)


async def whole_reply(request: Request, reply: Coroutine[None, None, object]) -> Response:
    """The reply as JSON; given up when the client goes away first."""
    body = await unless_disconnected(request.receive, reply)
    if body is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(orjson.dumps(body), media_type="application/json")


async def unless_disconnected(receive: Receive, answer: Coroutine[None, None, Answer]) -> Answer | None:
    """Await the answer, or cancel it and give None as soon as the client is gone."""
    answering = asyncio.create_task(answer)
    listening = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((answering, listening), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        answering.cancel()
        listening.cancel()
        # both are over before this returns, so that nothing of the request runs on
        await asyncio.wait((answering, listening))


async def _next_frame(frames: AsyncGenerator[bytes, None]) -> bytes:
    return await anext(frames)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
