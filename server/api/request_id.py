"""Every request has an id: the client's own, if it is one that a log can bear, or a new one. Answers carry it."""

import re
import uuid

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
# what ids of proxies and tracers are made of; nothing that could forge a line of a log
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")

log = structlog.get_logger(__name__)


class RequestId:
    """ASGI middleware: chooses the id, puts it into the answer's head, and logs both at level debug."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        offered = dict(scope["headers"]).get(HEADER.encode(), b"").decode("latin-1")
        request_id = offered if _SANE_ID.fullmatch(offered) else new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id

        async def naming_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
                status, path = message["status"], scope["path"]
                log.debug("answered", request_id=request_id, method=scope["method"], path=path, status=status)
            await send(message)

        await self._app(scope, receive, naming_send)


def new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


def request_id_of(scope: Scope) -> str | None:
    """The id of a request that went through RequestId."""
    request_id: str | None = scope.get("state", {}).get("request_id")
    return request_id
