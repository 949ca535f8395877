"""Bodies are bounded before they are read into memory, and their nesting before they are parsed."""

import asyncio
import json
import socket
from collections.abc import Iterator

import orjson
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from server.api import limits
from server.api.errors import error_response
from server.api.limits import MAX_JSON_DEPTH, MAX_JSON_STRUCTURE, BodyLimit, check_json_shape
from server.errors import InvalidRequest, PayloadTooLarge
from tests.server.api.conftest import AppFactory, local_client

MAX_BODY_BYTES = 2048
JSON_HEADERS = {"Content-Type": "application/json"}

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text('ab"\\[]{}'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{'), inner, max_size=3),
)


@pytest.fixture
def small(make_app: AppFactory) -> Iterator[TestClient]:
    with local_client(make_app(max_body_bytes=MAX_BODY_BYTES)) as started:
        yield started


def test_a_body_that_says_it_is_too_large_is_413(small: TestClient) -> None:
    response = small.post("/v1/completions", content=b"x" * (MAX_BODY_BYTES + 1))
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert str(MAX_BODY_BYTES) in response.json()["error"]["message"]


def test_a_body_without_a_length_is_413_as_soon_as_it_is_too_large(small: TestClient) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 512

    response = small.post("/v1/completions", content=endless(), headers=JSON_HEADERS)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_nothing_more_is_waited_for_where_the_body_is_whole() -> None:
    received: list[Message] = [{"type": "http.request", "body": b"x" * 20, "more_body": False}]
    sent: list[Message] = []

    async def receive() -> Message:
        return received.pop()

    async def send(message: Message) -> None:
        sent.append(message)

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except PayloadTooLarge as error:
            await error_response(error)(scope, receive, send)

    # a second look at what comes in would find the list empty
    asyncio.run(BodyLimit(read, 10)({"type": "http", "headers": []}, receive, send))
    assert sent[0]["status"] == 413
    assert [message.get("more_body", False) for message in sent[1:]] == [False]


def send_without_end(connection: socket.socket) -> None:
    while True:
        connection.sendall(b" " * 65536)


@pytest.mark.parametrize("framing", ["Content-Length: 33554432", "Transfer-Encoding: chunked"])
def test_a_client_that_sends_all_before_it_reads_gets_the_answer(live_url: str, framing: str) -> None:
    # given four times what is taken, from a client that looks up from it only at its end
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n" if "chunked" in framing else b" " * 65536
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(live_url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head.encode())
        for _ in range(512):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n" if "chunked" in framing else b"")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()
    assert b"8388608 bytes" in answer


def test_a_client_that_sends_on_for_ever_is_cut(live_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_SECONDS", 0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(live_url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(head)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_without_end(connection)


def test_the_largest_body_is_taken(small: TestClient) -> None:
    body = json.dumps({"prompt": "a", "user": ""})
    body = json.dumps({"prompt": "a", "user": "u" * (MAX_BODY_BYTES - len(body))})
    assert len(body) == MAX_BODY_BYTES
    assert small.post("/v1/completions", content=body, headers=JSON_HEADERS).status_code == 200


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


@given(value=values, wrapping=st.integers(0, MAX_JSON_DEPTH + 5))
def test_nesting_is_counted_outside_of_strings(value: object, wrapping: int) -> None:
    body = b"[" * wrapping + orjson.dumps(value) + b"]" * wrapping
    if wrapping + depth_of(value) <= MAX_JSON_DEPTH:
        check_json_shape(body)
    else:
        with pytest.raises(InvalidRequest, match=str(MAX_JSON_DEPTH)):
            check_json_shape(body)


@pytest.mark.parametrize("body", [b'"', b'"\\', b'{"a": "\\"[[[', b"]]]]", b'\\"' * 50_000, b'"' * 99_999])
def test_broken_json_is_left_to_the_parser(body: bytes) -> None:
    check_json_shape(body)


@pytest.mark.parametrize("part", [b"[]", b'""', b'"k":{}'])
def test_parts_without_end_are_refused_before_they_are_parsed(part: bytes) -> None:
    # no JSON as a whole, which nobody finds out
    body = b"[" + b",".join([part] * MAX_JSON_STRUCTURE)
    with pytest.raises(InvalidRequest, match=str(MAX_JSON_STRUCTURE)):
        check_json_shape(body)


def test_text_may_have_as_many_brackets_as_it_likes() -> None:
    check_json_shape(orjson.dumps({"prompt": "[]" * MAX_JSON_STRUCTURE}))


@pytest.mark.parametrize(
    ("path", "body", "param", "numbers"),
    [
        ("/v1/completions", {"prompt": ["a"] * 5, "n": 2}, "n", ["10", "9", "4", "5"]),
        ("/v1/completions", {"prompt": ["a"] * 10}, "prompt", ["10", "9"]),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 10}, "n", ["10", "9"]),
    ],
)
def test_a_request_that_could_never_fit_is_told_the_numbers(
    make_app: AppFactory, path: str, body: dict[str, object], param: str, numbers: list[str]
) -> None:
    with local_client(make_app(max_num_seqs=4, max_waiting=5)) as client:
        response = client.post(path, json=body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == param
        assert all(number in error["message"] for number in numbers)
        assert client.post("/v1/completions", json={"prompt": ["a"] * 4, "n": 2}).status_code == 200
