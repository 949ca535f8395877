"""The engine as the API sees it, whatever carries the messages. Imports neither torch nor any transport."""

from collections.abc import AsyncGenerator
from typing import Protocol

from server.engine.request import EngineStatus, GenerationRequest, TokenEvent


class EngineClient(Protocol):
    """One engine. All calls come from one event loop.

    Whatever happens to the engine, a request that was taken ends in exactly one event with a finish reason, and
    the client stays usable: it says where it stands through `status`.
    """

    async def start(self) -> None:
        """Begin to load the model and return at once; `status` tells the progress, `wait_until_settled` the end."""

    async def wait_until_settled(self) -> EngineStatus:
        """Wait until the state is "ready" or "failed" and return that status."""

    async def wait_until_failed(self) -> EngineStatus:
        """Wait until the state is "failed", which it stays: at the start, or when an engine is not restarted again."""

    async def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let those under way finish for drain_seconds, end the others with ABORTED."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """An async generator of the request's news; the last event has a finish reason.

        Nothing is sent before the first event is awaited, so that is where the errors of admission come from:
        InvalidRequest and ContextLengthExceeded for what could never run, QueueFull when max_num_seqs + max_waiting
        requests are under way, EngineUnavailable when the engine is not ready (a restarting engine still queues
        nothing new). Closing the generator early (aclose, or the cancellation of the task that reads it) aborts the
        request in the engine. A reader that is late gets what it missed merged into one event.
        """

    def status(self) -> EngineStatus:
        """Where the engine stands now: never waits, never raises."""
