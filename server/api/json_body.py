"""A request's body to a checked model. NaN, lone surrogates, deep nesting and fields without end are refused."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.api.errors import describe, invalid_request_from
from server.api.limits import check_json_shape
from server.errors import InvalidRequest, UnsupportedMediaType

Body = TypeVar("Body", bound=BaseModel)
# a larger body takes milliseconds to parse and check, which other requests' streams should not wait for
LARGE_BODY_BYTES = 1 << 16
# all fields that this server knows, used or not, are fewer than a hundred
MAX_FIELDS = 128


def json_body(schema: type[Body]) -> Callable[[Request], Awaitable[Body]]:
    """A dependency that gives a route its body."""

    async def read(request: Request) -> Body:
        check_content_type(request.headers.get("content-type"))
        content = await request.body()
        if len(content) > LARGE_BODY_BYTES:
            return await asyncio.to_thread(parse_body, content, schema)
        return parse_body(content, schema)

    return read


def check_content_type(header: str | None) -> None:
    """Raise UnsupportedMediaType unless a body is said to be JSON.

    Any web page may have a browser send other types here, without asking; for this one a browser asks first.
    """
    if not is_json_type(header):
        media_type = _media_type(header)
        said = f"it is {describe(media_type)}" if media_type else "there is none"
        raise UnsupportedMediaType(f"the header Content-Type must be application/json, and {said}")


def is_json_type(header: str | None) -> bool:
    """Whether a Content-Type says that a body is JSON."""
    media_type = _media_type(header)
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def _media_type(header: str | None) -> str:
    return (header or "").partition(";")[0].strip().lower()


def parse_body(content: bytes, schema: type[Body]) -> Body:
    """Raises InvalidRequest with what is wrong, and with the field's name as `param`."""
    if not content:
        raise InvalidRequest("the body is empty, and it must be a JSON object")
    check_json_shape(content)
    try:
        fields = orjson.loads(content)
        if isinstance(fields, dict) and len(fields) > MAX_FIELDS:
            raise InvalidRequest(f"the body must have at most {MAX_FIELDS} fields, and it has {len(fields)}")
        return schema.model_validate(fields)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is no valid JSON: {error}") from error
    except ValidationError as error:
        raise invalid_request_from(error) from error
