"""The API's side of the engine's process: requests, status, and a new process when one dies. Never imports torch."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from server.engine.admission import check_request
from server.engine.child_process import EngineChild
from server.engine.config import EngineConfig
from server.engine.heartbeat import HeartbeatPolicy
from server.engine.life_listener import LifeListener, NoListener
from server.engine.messages import Abort, FromEngine, Generate, Loading, News, Ready, StartFailed
from server.engine.open_requests import OpenRequests
from server.engine.request import EngineStatus, FinishReason, GenerationRequest, TokenEvent
from server.engine.status_board import StatusBoard

# how long the process may take to end by itself when it has nothing to do
STOP_SECONDS = 5.0


@dataclass(frozen=True)
class RestartPolicy:
    """At most max_restarts within window_seconds; the k-th of them after first_delay_seconds * 2**k."""

    max_restarts: int = 5
    window_seconds: float = 600.0
    first_delay_seconds: float = 0.5


class RestartBudget:
    """How often the engine was restarted of late, and so how long to wait, or whether to give up."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._restarts: deque[float] = deque()

    def next_delay(self, now: float) -> float | None:
        """Seconds to wait before the restart that is taken from the budget now; None when it is used up."""
        while self._restarts and now - self._restarts[0] > self._policy.window_seconds:
            self._restarts.popleft()
        if len(self._restarts) == self._policy.max_restarts:
            return None
        self._restarts.append(now)
        return self._policy.first_delay_seconds * 2.0 ** (len(self._restarts) - 1)


class ProcessEngineClient:
    """An EngineClient whose engine is a child process. One task supervises it; everything runs on one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        restart_policy: RestartPolicy | None = None,
        listener: LifeListener | None = None,
        heartbeat: HeartbeatPolicy | None = None,
    ) -> None:
        self._config = config
        self._listener = listener or NoListener()
        self._heartbeat = heartbeat or HeartbeatPolicy()
        self._budget = RestartBudget(restart_policy or RestartPolicy())
        self._requests = OpenRequests(config.max_num_seqs + config.max_waiting)
        self._board = StatusBoard()
        self._child: EngineChild | None = None
        self._supervision: asyncio.Task[None] | None = None
        self._start_error: str | None = None
        self._is_stopping = False

    @property
    def process_id(self) -> int | None:
        """Of the engine that serves now, for whoever watches the machine."""
        return None if self._child is None else self._child.process_id

    async def start(self) -> None:
        self._board.set_loading("starting the engine's process")
        self._supervision = asyncio.create_task(self._supervise(), name="engine supervision")

    async def wait_until_settled(self) -> EngineStatus:
        return await self._board.wait_until_settled()

    async def wait_until_failed(self) -> EngineStatus:
        return await self._board.wait_until_failed()

    async def stop(self, drain_seconds: float) -> None:
        self._is_stopping = True
        self._board.set_draining("finishing the requests under way")
        await self._requests.wait_until_empty(drain_seconds)
        num_cut = self._requests.end_all(FinishReason.ABORTED, "the server is shutting down")
        if self._child is not None:
            if num_cut:
                # it works on what nobody waits for any more, and has nothing to save
                self._child.kill()
            else:
                self._child.terminate()
            await self._child.wait_until_ended(STOP_SECONDS)
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait({self._supervision})

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        check_request(request, self._board.require_ready())
        stream = self._requests.open(request)
        self._send(Generate(request))
        try:
            async for event in stream:
                yield event
        finally:
            if self._requests.close(request.request_id, stream):
                self._send(Abort(request.request_id))

    def status(self) -> EngineStatus:
        return self._board.status

    async def _supervise(self) -> None:
        """One process after the other, until stop or until the budget is used up."""
        try:
            while True:
                self._start_error = None
                child = self._child = await EngineChild.spawn(self._config, self._heartbeat)
                self._listener.spawned(child.process_id)
                how_it_ended = await child.hear(self._handle, self._take_pulse)
                self._child = None
                if self._is_stopping:
                    num_lost = self._requests.end_all(FinishReason.ERROR, how_it_ended)
                    if num_lost:
                        self._listener.ended(child.process_id, how_it_ended, num_lost)
                    return
                delay = self._note_the_end(child.process_id, self._start_error or how_it_ended)
                if delay is None:
                    return
                self._listener.restarting(delay)
                await asyncio.sleep(delay)
        finally:
            if not self._is_stopping and self._board.status.state != "failed":
                self._give_up("the engine is no longer supervised; standard error has the traceback")

    def _note_the_end(self, process_id: int, reason: str) -> float | None:
        """Tell everybody. Returns the seconds until the next start; None if there is none."""
        if self._board.status.model is None:
            # the first start: what is wrong is in the settings or the model, and trying again would not help
            if self._start_error is not None:
                self._board.set_refused(reason)
            self._give_up(reason)
            return None
        num_lost = self._requests.end_started(f"the engine stopped while it worked on this request: {reason}")
        self._listener.ended(process_id, reason, num_lost)
        delay = self._budget.next_delay(time.monotonic())
        if delay is None:
            self._give_up(f"{reason}; it was restarted too often of late to try once more")
            return None
        self._board.set_restarting(f"{reason}; starting again in {delay:g} s")
        return delay

    def _give_up(self, reason: str) -> None:
        self._board.set_failed(reason)
        self._listener.given_up(reason)
        self._requests.end_all(FinishReason.ERROR, f"the engine stopped: {reason}")

    def _take_pulse(self, is_alive: bool) -> None:  # noqa: FBT001 - it is the whole news
        self._board.set_alive(is_alive=is_alive)
        if self._child is not None:
            self._listener.pulse_changed(self._child.process_id, is_alive=is_alive)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case News(news):
                self._board.set_stats(news.stats)
                self._requests.mark_started(news.started)
                self._requests.deliver(news.events)
            case Loading(detail):
                self._board.set_loading(detail)
            case Ready(model):
                self._board.set_ready(model)
                if self._child is not None:
                    self._listener.became_ready(self._child.process_id, model)
                # an engine that died before it looked at them left these
                for request in self._requests.unstarted():
                    self._send(Generate(request))
            case StartFailed(detail):
                self._start_error = detail

    def _send(self, message: Generate | Abort) -> None:
        """To the engine that serves; while there is none, a request waits for the next one and an abort is needless."""
        if self._child is not None and self._board.status.state in ("ready", "unresponsive", "draining"):
            self._child.send(message)
