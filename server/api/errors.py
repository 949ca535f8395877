"""Every error as OpenAI's body {"error": {"message", "type", "param", "code"}}, whoever raised it."""

import re
import traceback

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.request_id import request_id_of
from server.errors import InvalidRequest, ServerError

log = structlog.get_logger(__name__)

MAX_SHOWN_CHARACTERS = 80
# nginx's code for a client that went away; nobody receives it, the log shows it
CLIENT_CLOSED_REQUEST = 499
# the part of a request where FastAPI found an error, which comes before the name
_REQUEST_PARTS = frozenset({"body", "query", "path", "header"})
# what the client still sends is not wanted
_UNREAD = frozenset({408, 413})
_TYPE_OF_STATUS = {401: "authentication_error", 429: "rate_limit_error"}
# what pydantic says in words of Python
_WISHES = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be a JSON object"),
    **dict.fromkeys(("list_type", "tuple_type"), "should be a list"),
    "string_type": "should be a string",
    "bool_type": "should be true or false",
    "int_type": "should be an integer",
    "float_type": "should be a number",
}
_LENGTH_WORDS = {
    "too_long": "takes at most {max_length} items",
    "too_short": "takes at least {min_length} item(s)",
}
_PYDANTICS_NOUN = re.compile(r"^[A-Z][a-z]+ should")


def error_bytes(error: ServerError) -> bytes:
    """The body for an error, as JSON."""
    body = {"message": error.message, "type": error.type, "param": error.param, "code": error.code}
    return orjson.dumps({"error": {name: _encodable(value) for name, value in body.items()}})


def error_response(error: ServerError) -> Response:
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.is_final:
        # OpenAI's clients repeat a 5xx unless they are told
        headers["x-should-retry"] = "false"
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in _UNREAD:
        headers["Connection"] = "close"
    return Response(error_bytes(error), error.status, headers, media_type="application/json")


def invalid_request_from(error: ValidationError | RequestValidationError) -> InvalidRequest:
    """The first thing that a schema found wrong, as a sentence that names the field and what was given."""
    detail = error.errors()[0]
    location = [part for part in detail["loc"] if part not in _REQUEST_PARTS]
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "json_invalid":
        return InvalidRequest("the body is no valid JSON")
    if detail["type"] == "value_error":
        # our own validators write whole sentences, which begin with the field's name
        return InvalidRequest(message, param=str(location[0]) if location else message.split()[0])
    if not location:
        return InvalidRequest(f"the body must be a JSON object, and it is {describe(detail.get('input'))}")
    param = str(location[0])
    path = ".".join(str(part) for part in location)
    if detail["type"] == "missing":
        return InvalidRequest(f"{path} is required", param=param)
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(f"{path} is no field that this route knows", param=param)
    limit = _LENGTH_WORDS.get(detail["type"])
    if limit is not None:
        context = detail["ctx"]
        return InvalidRequest(f"{path} {limit.format(**context)}, and it has {context['actual_length']}", param=param)
    wish = _WISHES.get(detail["type"]) or _PYDANTICS_NOUN.sub("should", message).removesuffix(".")
    return InvalidRequest(f"{path} {wish}, and it is {describe(detail.get('input'))}", param=param)


def describe(value: object) -> str:
    """A value from a request as it looked there, cut to a length that fits into a sentence."""
    try:
        text = orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        text = str(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."


def install_error_handlers(app: FastAPI) -> None:
    """Give every error of an application OpenAI's body; those nobody expected are logged and told nothing of."""

    @app.exception_handler(ServerError)
    async def answer_server_error(_request: Request, error: ServerError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def answer_invalid_request(_request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request_from(error))

    @app.exception_handler(HTTPException)
    async def answer_http_exception(request: Request, error: HTTPException) -> Response:
        refusal = ServerError(_http_message(request, error))
        refusal.status = error.status_code
        refusal.type = _TYPE_OF_STATUS.get(error.status_code, "invalid_request_error")
        response = error_response(refusal)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def end_quietly(_request: Request, _error: ClientDisconnect) -> Response:
        """The client left while it sent its body, which is no fault of anybody here."""
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_middleware(UnexpectedErrors)


class UnexpectedErrors:
    """ASGI middleware: an error that nobody expected is logged once, and answered, and the connection stays in order.

    Starlette's own handler raises the error again, whereupon the connection is cut. An answer that has begun is cut
    here too, as nothing else would tell the client that it is not whole.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception as error:
            if has_begun or scope["type"] != "http":
                raise
            await error_response(note_unexpected(scope, error))(scope, receive, send)


def note_unexpected(scope: Scope, error: Exception) -> ServerError:
    """Log an error that nobody expected, and what to tell the client of it: nothing of the inside."""
    words = "".join(traceback.format_exception(error))
    log.error("unexpected error", path=scope["path"], request_id=request_id_of(scope), traceback=words)
    return ServerError("the server failed on this request; its log says why, beside the id in x-request-id")


def _http_message(request: Request, error: HTTPException) -> str:
    path = request.scope["path"]
    if error.status_code == 404:
        return f"there is no route {path}"
    if error.status_code == 405:
        return f"{path} does not take {request.method}"
    return str(error.detail)


def _encodable(value: str | None) -> str | None:
    """Lone surrogates, which a client's JSON may hold, have no bytes."""
    return value.encode("utf-8", "replace").decode() if value is not None else None
