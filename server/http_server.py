"""Runs the application on a socket until it is told to end, and ends it in order. Knows no routes."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from server.engine.client_protocol import EngineClient
from server.engine.request import EngineStatus
from server.http_protocol import BoundedHttpProtocol
from server.settings import Settings

BACKLOG = 2048
# beside one for each request that may run or wait: probes, answers that say no, and clients between two requests
SPARE_CONNECTIONS = 512
# how long a client may keep a connection open between requests
KEEP_ALIVE_SECONDS = 30
# after the drain every request has ended, and this is for its last bytes to leave
CLOSE_SECONDS = 5


class ListenError(Exception):
    """The address cannot be listened on; the message is one sentence for the terminal."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model loads, so that a port in use is told at once. Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # now, as two sockets may bind one port, and only one may listen
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot listen on {host} port {port}: {error.strerror}; stop what uses it, or choose another with --port"
        ) from error
    return listener


class GracefulServer(uvicorn.Server):
    """uvicorn, with the engine drained before connections close: SIGTERM lets requests finish, a second one ends them.

    announce: called when the model is ready. stop_jobs: called when the drain begins, so that a job ends beside it and
    not after it; the application waits for that end.
    failure: the engine's status when it never gets ready or is not restarted any more, once that is known; the server
    then ends, as what watches over it can start it anew and nobody else can.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        engine: EngineClient,
        announce: Callable[[], None],
        stop_jobs: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol,
                ws="none",
                limit_concurrency=settings.max_num_seqs + settings.max_waiting + SPARE_CONNECTIONS,
                log_config=None,
                access_log=settings.log_level == "debug",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
                server_header=False,
            )
        )
        self.failure: EngineStatus | None = None
        self._engine = engine
        self._announce = announce
        self._stop_jobs = stop_jobs
        self._drain_seconds = settings.drain_seconds
        self._num_signals = 0
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task[None] | None = None
        # held, as a task that nobody holds may be collected
        self._stopping_jobs: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._watch = asyncio.create_task(self._watch_engine())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests with 503, let the others finish, then close the connections."""
        if self._watch is not None:
            self._watch.cancel()
        if self._stop_jobs is not None:
            self._stopping_jobs = asyncio.ensure_future(self._stop_jobs())
        draining = asyncio.create_task(self._engine.stop(self._drain_seconds))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done():
            draining.cancel()
            await self._engine.stop(drain_seconds=0)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """End in order, with exit status 0, where uvicorn would end by the signal itself.

        The second signal ends the requests under way too; the third waits for nothing more.
        """
        self._num_signals += 1
        self.should_exit = True
        self.force_exit = self._num_signals > 2
        if self._num_signals > 1 and self._loop is not None:
            # from a signal handler, which must wake the loop by itself
            self._loop.call_soon_threadsafe(self._hurry.set)

    async def _watch_engine(self) -> None:
        if (await self._engine.wait_until_settled()).state == "ready":
            self._announce()
        self.failure = await self._engine.wait_until_failed()
        self.should_exit = True
