"""The client's side of requests under way: who waits for news of which, bounded. Knows no transport and no engine."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.engine.request import FinishReason, GenerationRequest, TokenEvent
from server.errors import InvalidRequest, QueueFull


def merge_events(events: list[TokenEvent]) -> TokenEvent:
    """One event with the news of several of one request, in order."""
    if len(events) == 1:
        return events[0]
    return TokenEvent(
        request_id=events[0].request_id,
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(logprob for event in events for logprob in event.logprobs),
        prompt_logprobs=tuple(logprob for event in events for logprob in event.prompt_logprobs),
        finish_reason=events[-1].finish_reason,
        error=events[-1].error,
        num_cached_tokens=sum(event.num_cached_tokens for event in events),
    )


class EventStream:
    """Async iterator over one request's news. A reader that is late gets what it missed merged into one event."""

    def __init__(self) -> None:
        self._pending: list[TokenEvent] = []
        self._has_news = asyncio.Event()
        self._is_over = False

    def put(self, event: TokenEvent) -> None:
        self._pending.append(event)
        self._has_news.set()

    def __aiter__(self) -> "EventStream":
        return self

    async def __anext__(self) -> TokenEvent:
        if self._is_over:
            raise StopAsyncIteration
        await self._has_news.wait()
        event = merge_events(self._pending)
        self._pending = []
        self._has_news.clear()
        self._is_over = event.finish_reason is not None
        return event


@dataclass
class _OpenRequest:
    request: GenerationRequest
    stream: EventStream = field(default_factory=EventStream)
    is_started: bool = False


class OpenRequests:
    """Requests from their admission to their final event. Used from one event loop only."""

    def __init__(self, max_open: int) -> None:
        self._max_open = max_open
        self._open: dict[str, _OpenRequest] = {}
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def open(self, request: GenerationRequest) -> EventStream:
        """Take a request in. Raises QueueFull at the bound, InvalidRequest for an id that is in use."""
        if len(self._open) >= self._max_open:
            raise QueueFull(f"{self._max_open} requests are already running or waiting, which is the limit: try later")
        if request.request_id in self._open:
            raise InvalidRequest(f"the request id {request.request_id!r} is in use by a request under way")
        entry = self._open[request.request_id] = _OpenRequest(request)
        self._is_empty.clear()
        return entry.stream

    def close(self, request_id: str, stream: EventStream) -> bool:
        """Forget a request whose reader leaves. True when its final event had not come, so the engine must be told."""
        entry = self._open.get(request_id)
        if entry is None or entry.stream is not stream:
            return False
        self._remove(request_id)
        return True

    def mark_started(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if request_id in self._open:
                self._open[request_id].is_started = True

    def deliver(self, events: Iterable[TokenEvent]) -> None:
        """Hand news to whoever waits for it; news of requests that were closed are dropped."""
        for event in events:
            entry = self._open.get(event.request_id)
            if entry is None:
                continue
            entry.stream.put(event)
            if event.finish_reason is not None:
                self._remove(event.request_id)

    def unstarted(self) -> list[GenerationRequest]:
        """The requests that no model has seen yet: safe to hand to another engine."""
        return [entry.request for entry in self._open.values() if not entry.is_started]

    def end_started(self, error: str) -> int:
        """Returns how many those were."""
        return self._end([key for key, entry in self._open.items() if entry.is_started], FinishReason.ERROR, error)

    def end_all(self, finish_reason: FinishReason, error: str) -> int:
        """Returns how many those were."""
        return self._end(list(self._open), finish_reason, error)

    async def wait_until_empty(self, seconds: float) -> None:
        """Return when no request is under way, or when the time is up."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), seconds)
        except TimeoutError:
            return

    def _end(self, request_ids: list[str], finish_reason: FinishReason, error: str) -> int:
        self.deliver(TokenEvent(key, (), finish_reason=finish_reason, error=error) for key in request_ids)
        return len(request_ids)

    def _remove(self, request_id: str) -> None:
        del self._open[request_id]
        if not self._open:
            self._is_empty.set()
