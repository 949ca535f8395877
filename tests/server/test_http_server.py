"""The server on its socket: what it refuses before a request is one, and how it ends."""

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest
from fastapi import FastAPI

from server.engine.request import EngineStatus
from server.http_protocol import MAX_HEAD_BYTES
from server.http_server import GracefulServer, ListenError, listen
from server.settings import load_settings

DEADLINE_SECONDS = 20.0


class SettledEngine:
    """An engine that has ended its start, and counts how it is stopped. It answers nothing."""

    def __init__(self, state: str, detail: str = "", *, drains: bool = True) -> None:
        self.stops: list[float] = []
        self._drains = drains
        self._status = EngineStatus(state, detail, None, None)  # type: ignore[arg-type]
        self._has_failed = asyncio.Event()
        if state == "failed":
            self._has_failed.set()

    async def start(self) -> None:
        raise AssertionError("the application starts it, and this one does not")

    async def wait_until_settled(self) -> EngineStatus:
        return self._status

    async def wait_until_failed(self) -> EngineStatus:
        await self._has_failed.wait()
        return self._status

    def fail(self, detail: str) -> None:
        self._status = EngineStatus("failed", detail, None, None)
        self._has_failed.set()

    async def stop(self, drain_seconds: float) -> None:
        self.stops.append(drain_seconds)
        if drain_seconds and not self._drains:
            await asyncio.Event().wait()

    def generate(self, request: object) -> object:
        raise AssertionError("nothing is generated here")

    def status(self) -> EngineStatus:
        return self._status


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


@contextmanager
def running_server(app: FastAPI, engine: SettledEngine, **settings: object) -> Iterator[tuple[GracefulServer, int]]:
    """A server and its port, as the command line runs it; it has ended when the block has."""
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = GracefulServer(app, load_settings({"drain_seconds": 3, **settings}), engine, ready.set)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
    thread.start()
    assert ready.wait(DEADLINE_SECONDS)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


@contextmanager
def running(app: FastAPI, **settings: object) -> Iterator[int]:
    """An application's port while it is served."""
    with running_server(app, SettledEngine("ready"), **settings) as (_, port):
        yield port


def run(engine: SettledEngine, while_it_runs: Callable[[GracefulServer, int], None]) -> GracefulServer:
    """Run a server that has one route, do something with it and its port, and return it when it has ended."""
    app = FastAPI()
    app.get("/live")(lambda: "live")
    with running_server(app, engine) as (server, port):
        while_it_runs(server, port)
    return server


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=str(port)):
            listen("127.0.0.1", port)


def test_an_address_that_is_not_here_is_named() -> None:
    with pytest.raises(ListenError, match=r"192\.0\.2\.1"):
        listen("192.0.2.1", 0)


def test_an_unending_head_closes_the_connection_and_the_server_goes_on() -> None:
    def send_headers(_server: GracefulServer, port: int) -> None:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.settimeout(DEADLINE_SECONDS)
        connection.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\nX-Huge: ")
        num_sent = 0
        try:
            while num_sent < 100 * MAX_HEAD_BYTES:
                num_sent += connection.send(b"x" * 4096)
            closed = connection.recv(1) == b""
        except OSError:
            closed = True
        assert closed
        assert httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200

    run(SettledEngine("ready"), send_headers)


def test_the_end_drains_the_engine_first() -> None:
    engine = SettledEngine("ready")
    run(engine, lambda _server, _port: None)
    assert engine.stops == [3]


def test_a_second_signal_ends_the_drain() -> None:
    # given an engine whose requests would not end by themselves
    engine = SettledEngine("ready", drains=False)

    def interrupt_twice(server: GracefulServer, _port: int) -> None:
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: engine.stops == [3])
        server.handle_exit(signal.SIGTERM, None)

    server = run(engine, interrupt_twice)
    assert engine.stops == [3, 0]
    assert not server.force_exit


def test_a_third_signal_waits_for_nothing() -> None:
    def interrupt_thrice(server: GracefulServer, _port: int) -> None:
        for _ in range(3):
            server.handle_exit(signal.SIGTERM, None)

    assert run(SettledEngine("ready"), interrupt_thrice).force_exit


def test_an_engine_that_cannot_start_ends_the_server_with_the_reason() -> None:
    app = FastAPI()
    engine = SettledEngine("failed", "model.safetensors is truncated")
    server = GracefulServer(app, load_settings({}), engine, announce=lambda: None)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: server.run(sockets=[listen("127.0.0.1", 0)]))
    thread.start()
    thread.join(DEADLINE_SECONDS)
    assert server.failure == engine.status()


def test_an_engine_that_is_given_up_later_ends_the_server_with_the_reason() -> None:
    engine = SettledEngine("ready")

    def give_up(server: GracefulServer, _port: int) -> None:
        # given a server that has been ready, when its engine fails for good
        assert server.failure is None
        assert server._loop is not None
        server._loop.call_soon_threadsafe(engine.fail, "it was restarted too often")
        # then it is about to end by itself
        wait_until(lambda: server.should_exit)

    server = run(engine, give_up)
    assert server.failure == EngineStatus("failed", "it was restarted too often", None, None)
    assert engine.stops == [3]
