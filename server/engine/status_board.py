"""The client's one record of where the engine stands, and who waits for it to settle."""

import asyncio
from dataclasses import replace

from server.engine.request import EngineStats, EngineStatus, ModelInfo
from server.errors import EngineUnavailable

_REFUSALS = {
    "loading": "the model is still loading",
    "unresponsive": "the engine does not answer",
    "restarting": "the engine stopped and is starting again",
    "draining": "the server is shutting down",
    "failed": "the engine could not be started",
}


class StatusBoard:
    """Written by one client, from one event loop."""

    def __init__(self) -> None:
        self.status = EngineStatus(state="loading", detail="not started", model=None, stats=None)
        self._is_settled = asyncio.Event()
        self._has_failed = asyncio.Event()

    def set_loading(self, detail: str) -> None:
        """Loading for the first time, or again: the state says which."""
        self.status = replace(self.status, detail=detail)

    def set_ready(self, model: ModelInfo) -> None:
        """The engine can take requests; one that is already shutting down stays so."""
        if self.status.state != "draining":
            self.status = replace(self.status, state="ready", detail="ready", model=model)
        self._is_settled.set()

    def set_alive(self, *, is_alive: bool) -> None:
        """An engine that was ready gives no sign of life, or does so again."""
        if self.status.state == "ready" and not is_alive:
            detail = "its process gives no sign of life; it may be stopped, or the machine short of memory"
            self.status = replace(self.status, state="unresponsive", detail=detail)
        elif self.status.state == "unresponsive" and is_alive:
            self.status = replace(self.status, state="ready", detail="ready")

    def set_restarting(self, detail: str) -> None:
        self.status = replace(self.status, state="restarting", detail=detail, stats=None)
        self.status = replace(self.status, num_restarts=self.status.num_restarts + 1)
        self._is_settled.clear()

    def set_draining(self, detail: str) -> None:
        self.status = replace(self.status, state="draining", detail=detail)

    def set_failed(self, detail: str) -> None:
        self.status = replace(self.status, state="failed", detail=detail)
        self._is_settled.set()
        self._has_failed.set()

    def set_refused(self, detail: str) -> None:
        """It never was ready, and what it was given is at fault."""
        self.status = replace(self.status, is_refusal=True)
        self.set_failed(detail)

    def set_stats(self, stats: EngineStats) -> None:
        self.status = replace(self.status, stats=stats)

    def require_ready(self) -> ModelInfo:
        """What the API must know of the model. Raises EngineUnavailable, with the reason, unless it is ready."""
        status = self.status
        if status.state != "ready" or status.model is None:
            raise EngineUnavailable(f"{_REFUSALS.get(status.state, status.state)}: {status.detail}")
        return status.model

    async def wait_until_settled(self) -> EngineStatus:
        await self._is_settled.wait()
        return self.status

    async def wait_until_failed(self) -> EngineStatus:
        await self._has_failed.wait()
        return self.status
