"""Bounds on what a request may bring before anything reads it: the body's bytes, and how deep its JSON nests."""

import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response
from server.errors import InvalidRequest, PayloadTooLarge

# no request that this server understands nests deeper than six
MAX_JSON_DEPTH = 64
# 4096 messages of one text part each have 53 thousand; what has more only costs time, seconds of it in a large body
MAX_JSON_STRUCTURE = 1 << 17
# a whole string, so that brackets in it do not count, or one bracket; possessive, so that it is linear in the body
_STRING_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_OPENING, _CLOSING = frozenset((b"[", b"{")), frozenset((b"]", b"}"))


class BodyLimit:
    """ASGI middleware: 413 for a body that says it is too large, and for one that turns out to be, while it is read."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body_bytes:
            await error_response(self._refusal())(scope, receive, send)
            return
        num_bytes = 0

        async def counting_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise self._refusal()
            return message

        await self._app(scope, counting_receive, send)

    def _refusal(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body is larger than {self._max_body_bytes} bytes, the most this server takes")


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
