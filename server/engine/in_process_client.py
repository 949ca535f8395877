"""The engine in a thread of this process: same interface as the child process, for tests and benchmarks.

Needs neither ZeroMQ nor msgspec. A fault in the engine's native code takes this process down with it.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from server.engine.admission import check_request
from server.engine.assembly import SETUP_ERRORS, assemble_engine
from server.engine.config import EngineConfig
from server.engine.loop import EngineLoop, Publish
from server.engine.open_requests import OpenRequests
from server.engine.request import EngineNews, EngineStatus, FinishReason, GenerationRequest, ModelInfo, TokenEvent
from server.engine.status_board import StatusBoard
from server.model.loader import LoadProgress

T = TypeVar("T")
Assemble = Callable[[EngineConfig, Callable[[LoadProgress], None], Publish], tuple[EngineLoop, ModelInfo]]


@dataclass(frozen=True)
class _Abort:
    request_id: str


class InProcessEngineClient:
    """An EngineClient. The inbox is the only thing the engine's thread and the event loop share."""

    def __init__(self, config: EngineConfig, assemble: Assemble = assemble_engine) -> None:
        self._config = config
        self._assemble = assemble
        self._requests = OpenRequests(config.max_num_seqs + config.max_waiting)
        self._board = StatusBoard()
        # None asks the thread to end
        self._inbox: SimpleQueue[GenerationRequest | _Abort | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._board.set_loading("loading the model")
        self._thread.start()

    async def wait_until_settled(self) -> EngineStatus:
        return await self._board.wait_until_settled()

    async def wait_until_failed(self) -> EngineStatus:
        return await self._board.wait_until_failed()

    async def stop(self, drain_seconds: float) -> None:
        self._board.set_draining("finishing the requests under way")
        await self._requests.wait_until_empty(drain_seconds)
        self._requests.end_all(FinishReason.ABORTED, "the server is shutting down")
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        check_request(request, self._board.require_ready())
        stream = self._requests.open(request)
        self._inbox.put(request)
        try:
            async for event in stream:
                yield event
        finally:
            if self._requests.close(request.request_id, stream):
                self._inbox.put(_Abort(request.request_id))

    def status(self) -> EngineStatus:
        return self._board.status

    def _run(self) -> None:
        """The engine's thread, from loading to the end."""
        try:
            loop, info = self._assemble(self._config, self._report, self._publish)
        except SETUP_ERRORS as error:
            self._post(self._board.set_refused, str(error))
            return
        self._post(self._board.set_ready, info)
        is_ordered = False
        try:
            self._drive(loop)
            is_ordered = True
        finally:
            if not is_ordered:
                self._post(self._fail, "the engine stopped by an error of its own; standard error has the traceback")

    def _drive(self, loop: EngineLoop) -> None:
        while True:
            # what came in during a step takes effect before the next one; only this thread takes
            if loop.has_work and self._inbox.empty():
                loop.step()
                continue
            match self._inbox.get():
                case None:
                    return
                case _Abort(request_id):
                    loop.abort(request_id)
                case request:
                    loop.submit(request)

    def _fail(self, detail: str) -> None:
        self._board.set_failed(detail)
        self._requests.end_all(FinishReason.ERROR, detail)

    def _take_news(self, news: EngineNews) -> None:
        self._board.set_stats(news.stats)
        self._requests.mark_started(news.started)
        self._requests.deliver(news.events)

    def _report(self, progress: LoadProgress) -> None:
        self._post(self._board.set_loading, progress.detail)

    def _publish(self, news: EngineNews) -> None:
        self._post(self._take_news, news)

    def _post(self, function: Callable[[T], None], argument: T) -> None:
        assert self._event_loop is not None
        self._event_loop.call_soon_threadsafe(function, argument)
