"""Connections that are one too many, malformed, slow, deaf or pipelined: each ends in order, and the server goes on."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from server import http_protocol, http_server
from tests.server.test_http_server import DEADLINE_SECONDS, running, wait_until

CHUNK = b"x" * 65536


@pytest.fixture
def app() -> FastAPI:
    """Reads a body, streams without end, waits without end, and counts what has ended of the last two."""
    app = FastAPI()
    app.state.num_waiting = app.state.num_ended = 0

    @app.get("/live")
    async def live() -> str:
        return "live"

    @app.post("/echo")
    async def echo(request: Request) -> Response:
        return Response(await request.body())

    @app.get("/wait")
    async def wait(request: Request) -> Response:
        app.state.num_waiting += 1
        while (await request.receive())["type"] != "http.disconnect":
            pass
        app.state.num_ended += 1
        return Response()

    @app.get("/flood")
    async def flood() -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield CHUNK
                    # as an engine does, it gives the others their turn
                    await asyncio.sleep(0)
            finally:
                app.state.num_ended += 1

        return StreamingResponse(chunks())

    return app


@contextmanager
def connected(port: int, sent: bytes = b"") -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(DEADLINE_SECONDS)
        connection.sendall(sent)
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def assert_is_error(answer: bytes, status: int, code: str) -> None:
    """It is one answer in OpenAI's shape, with an id, and the connection's last."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status_line, *headers = head.decode().lower().split("\r\n")
    assert status_line.startswith(f"http/1.1 {status} ")
    assert "connection: close" in headers
    assert "content-type: application/json" in headers
    assert any(header.startswith("x-request-id: req-") for header in headers)
    assert json.loads(body)["error"]["code"] == code


def send_without_end(connection: socket.socket) -> None:
    while True:
        connection.sendall(CHUNK)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


@pytest.mark.parametrize(
    "sent",
    [
        *(b"nonsense\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET /live HTTP/9.9\r\n\r\n", b"GET live HTTP/1.1\r\n\r\n"),
        b"GET /live HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nno-number\r\n",
    ],
)
def test_what_is_no_http_is_told_in_json(app: FastAPI, sent: bytes) -> None:
    with running(app) as port, connected(port, sent) as connection:
        assert_is_error(rest_of(connection), 400, "malformed_http")


def test_a_body_that_does_not_come_is_not_waited_for(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.05)
    request = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc"
    with running(app) as port, connected(port, request) as connection:
        assert_is_error(rest_of(connection), 408, "request_timeout")


def test_a_body_that_came_stops_the_clock(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    # given an answer that takes longer than a body may
    monkeypatch.setattr(http_protocol, "BODY_SECONDS", 0.01)
    with running(app) as port, connected(port, get("/wait")) as connection:
        wait_until(lambda: app.state.num_waiting == 1)
        for _ in range(20):
            assert httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200
        # then nothing has come, not even an end
        connection.setblocking(False)
        with pytest.raises(BlockingIOError):
            connection.recv(1)


def test_a_connection_too_many_is_told_so(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SPARE_CONNECTIONS", 1)
    with running(app, max_num_seqs=1, max_waiting=0) as port:
        with connected(port, get("/wait")), connected(port, get("/wait")):
            wait_until(lambda: app.state.num_waiting == 2)
            with connected(port) as third:
                assert_is_error(rest_of(third), 503, "too_many_connections")
        # and when the others have gone there is room again
        wait_until(lambda: app.state.num_ended == 2)
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200)


def test_a_connection_too_many_may_send_all_it_has_before_it_reads_the_answer(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "SPARE_CONNECTIONS", 1)
    upload = b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 16777216\r\n\r\n" + bytes(1 << 24)
    with (
        running(app, max_num_seqs=1, max_waiting=0) as port,
        connected(port, get("/wait")) as first,
        connected(port, get("/wait")),
    ):
        wait_until(lambda: app.state.num_waiting == 2)
        with connected(port, upload) as third:
            assert_is_error(rest_of(third), 503, "too_many_connections")
            # and while that one is still there it takes nobody's place
            first.close()
            wait_until(lambda: app.state.num_ended == 1)
            assert httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200


def test_a_refused_client_that_sends_on_for_ever_is_cut(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 0.05)
    with (
        running(app) as port,
        connected(port, b"nonsense\r\n\r\n") as connection,
        pytest.raises((ConnectionResetError, BrokenPipeError)),
    ):
        send_without_end(connection)


def test_those_that_linger_are_bounded(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_LINGERING", 0)
    with running(app) as port, connected(port, b"nonsense\r\n\r\n") as connection:
        assert_is_error(rest_of(connection), 400, "malformed_http")
        # nobody reads any more
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_without_end(connection)


def test_a_client_that_never_reads_is_let_go(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "STALL_SECONDS", 0.05)
    with running(app) as port, connected(port, get("/flood")):
        wait_until(lambda: app.state.num_ended == 1)


@pytest.mark.parametrize("next_requests", [get("/live"), get("/live") * 3, get("/wait"), get("/live")[:20]])
def test_a_client_that_goes_after_sending_its_next_requests_is_noticed(app: FastAPI, next_requests: bytes) -> None:
    with running(app) as port:
        with connected(port, get("/wait")) as connection:
            wait_until(lambda: app.state.num_waiting == 1)
            connection.sendall(next_requests)
            httpx.get(f"http://127.0.0.1:{port}/live")
        wait_until(lambda: app.state.num_ended == 1)


def test_requests_that_come_at_once_are_answered_in_order(app: FastAPI) -> None:
    posts = [f"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n{digit}".encode() for digit in "123"]
    last = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 1\r\n\r\n4"
    with running(app) as port, connected(port, b"".join([*posts, last])) as connection:
        answers = rest_of(connection).split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert [answer[-1:] for answer in answers] == [b"1", b"2", b"3", b"4"]


def test_a_client_that_sends_without_end_while_it_waits_is_cut(app: FastAPI) -> None:
    with running(app) as port, connected(port, get("/wait")) as connection:
        wait_until(lambda: app.state.num_waiting == 1)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(get("/live") * 1_000_000)
        wait_until(lambda: app.state.num_ended == 1)


def test_nonsense_after_a_request_does_not_break_into_its_answer(app: FastAPI) -> None:
    with running(app) as port, connected(port, get("/wait")) as connection:
        wait_until(lambda: app.state.num_waiting == 1)
        connection.sendall(b"nonsense\r\n\r\n")
        assert rest_of(connection) == b""
        wait_until(lambda: app.state.num_ended == 1)
