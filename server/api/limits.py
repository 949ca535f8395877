"""Bounds on what a request may bring before anything reads it: the body's bytes, and how deep its JSON nests."""

import asyncio
import re
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import InvalidRequest, PayloadTooLarge

# no request that this server understands nests deeper than six
MAX_JSON_DEPTH = 64
# 4096 messages of one text part each have 53 thousand; what has more only costs time, seconds of it in a large body
MAX_JSON_STRUCTURE = 1 << 17
# a whole string, so that brackets in it do not count, or one bracket; possessive, so that it is linear in the body
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
# how long a client that was refused may go on sending: most read no answer before they have sent all
LINGER_SECONDS = 5.0
_OPENING, _CLOSING = frozenset((b"[", b"{")), frozenset((b"]", b"}"))


class BodyLimit:
    """ASGI middleware: 413 for a body that says it is too large, and for one that turns out to be, while it is read.

    Either way the rest is taken and dropped for a while before the connection is closed, as closing one that bytes
    still come in on takes the answer from the client too.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        upload = _Upload(receive, send, self._max_body_bytes)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body_bytes:
            await error_response(upload.refusal())(scope, receive, upload.send)
            return
        await self._app(scope, upload.receive, upload.send)


class _Upload:
    """One request: its body is counted while it is read, and read to its end once it is refused as too large."""

    def __init__(self, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self._receive, self._send = receive, send
        self._max_body_bytes = max_body_bytes
        self._num_bytes = 0
        self._is_refused = False
        self._is_read = False

    def refusal(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self._max_body_bytes} bytes, the most this server takes")

    async def receive(self) -> Message:
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_body_bytes:
            raise self.refusal()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_refused = message["status"] == PayloadTooLarge.status
        elif self._is_refused and not self._is_read and not message.get("more_body", False):
            # the client has the whole answer then, and may finish sending before the connection is closed
            await self._send({**message, "more_body": True})
            await self._drop_the_rest()
            message = {"type": message["type"], "body": b""}
        await self._send(message)

    async def _drop_the_rest(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await self._receive()).get("more_body", False):
                    pass


def check_json_shape(body: bytes) -> None:
    """Raise InvalidRequest for JSON that nests deeper, or has more parts, than any parser should follow.

    Needs no recursion itself, and reads no further than it takes to know.
    """
    depth = 0
    for number, match in enumerate(_STRING_OR_BRACKET.finditer(body)):
        if number == MAX_JSON_STRUCTURE:
            raise InvalidRequest(f"the body's JSON has more than {MAX_JSON_STRUCTURE} strings and brackets")
        token = match.group() if match.end() - match.start() == 1 else b""
        if token in _OPENING:
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise InvalidRequest(f"the body's JSON nests deeper than {MAX_JSON_DEPTH} levels")
        elif token in _CLOSING:
            depth -= 1
