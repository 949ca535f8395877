"""An engine without a model: real admission, order, aborts and ends, with tokens that a script gives."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from server.engine.open_requests import merge_events
from server.engine.request import (
    EngineStats,
    EngineStatus,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    TokenEvent,
    TokenLogprob,
)
from server.errors import EngineUnavailable, QueueFull

Script = Callable[[GenerationRequest], Sequence[int]]
# descending, so that the first is the likeliest; finite in JSON and exact in binary
LOGPROBS = (-0.5, -1.5, -2.5, -3.5, -4.5)


class FakeEngineClient:
    """An EngineClient whose output tokens are `script(request)`, cut by max_tokens and ended by stop tokens.

    capacity: how many requests may be under way. The log-probability of a scripted token is -0.5, and the next ids
    follow it. `gate` closed: requests wait before their first token. fail_after: tokens until the engine "dies".
    expire_after: tokens until the deadline, where a request has one. pause_after: events until a request says nothing
    more. is_read_late: all that a request says comes merged into one event.
    """

    def __init__(self, script: Script, model: ModelInfo, *, capacity: int = 64) -> None:
        self.requests: list[GenerationRequest] = []
        self.open: set[str] = set()
        self.aborted: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail_after: int | None = None
        self.pause_after: int | None = None
        self.expire_after = 2
        self.tokens_per_event = 1
        self.is_read_late = False
        # by choice, how many tokens of its prompt it says that it found
        self.cached_tokens: list[int] = []
        self.script = script
        self._model = model
        self._capacity = capacity
        self._status = EngineStatus("loading", "loading layer 3 of 30", None, None)

    async def start(self) -> None:
        self.become_ready()

    async def wait_until_settled(self) -> EngineStatus:
        return self._status

    async def wait_until_failed(self) -> EngineStatus:
        await asyncio.Event().wait()
        return self._status

    async def stop(self, drain_seconds: float) -> None:
        self.set_state("draining", "the server is shutting down")

    def become_ready(self) -> None:
        self._status = EngineStatus("ready", "", self._model, None)

    def set_state(self, state: str, detail: str) -> None:
        self._status = EngineStatus(state, detail, self._status.model, None)  # type: ignore[arg-type]

    def status(self) -> EngineStatus:
        status = self._status
        stats = EngineStats(len(self.open), 0, 100 - len(self.open), 100, 0, 0, 0, 0)
        return EngineStatus(status.state, status.detail, status.model, stats)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        if self._status.state != "ready":
            raise EngineUnavailable(f"the engine is {self._status.state}")
        if len(self.open) >= self._capacity:
            raise QueueFull(f"{self._capacity} requests are under way")
        self.requests.append(request)
        self.open.add(request.request_id)
        is_over = False
        try:
            await self.gate.wait()
            events = self._events(request)
            for position, event in enumerate([merge_events(events)] if self.is_read_late else events):
                if position == self.pause_after:
                    await asyncio.Event().wait()
                is_over = event.finish_reason is not None
                yield event
                await asyncio.sleep(0)
        finally:
            self.open.discard(request.request_id)
            if not is_over:
                self.aborted.append(request.request_id)

    def _events(self, request: GenerationRequest) -> list[TokenEvent]:
        sampling = request.sampling
        tokens = list(self.script(request))[: sampling.max_tokens]
        reason = FinishReason.LENGTH
        for position, token_id in enumerate(tokens):
            if token_id in sampling.stop_token_ids and position >= sampling.min_tokens:
                tokens, reason = tokens[: position + 1], FinishReason.STOP
                break
        events = []
        for start in range(0, len(tokens), self.tokens_per_event):
            if request.deadline is not None and start >= self.expire_after:
                return [
                    *events,
                    TokenEvent(request.request_id, (), finish_reason=FinishReason.TIMEOUT, error="too late"),
                ]
            if self.fail_after is not None and start >= self.fail_after:
                return [*events, TokenEvent(request.request_id, (), finish_reason=FinishReason.ERROR, error="it died")]
            part = tokens[start : start + self.tokens_per_event]
            is_last = start + self.tokens_per_event >= len(tokens)
            events.append(self._event(request, part, is_first=start == 0, reason=reason if is_last else None))
        return events

    def _event(
        self, request: GenerationRequest, part: list[int], *, is_first: bool, reason: FinishReason | None
    ) -> TokenEvent:
        sampling = request.sampling
        prompt: list[TokenLogprob | None] = []
        if is_first and sampling.prompt_logprobs is not None:
            ids = request.prompt_token_ids[1:]
            prompt = [None, *(self._logprob(token_id, sampling.prompt_logprobs) for token_id in ids)]
        logprobs = [] if sampling.logprobs is None else [self._logprob(id_, sampling.logprobs) for id_ in part]
        choice = int(request.request_id.rsplit("-", 1)[1])
        num_cached = self.cached_tokens[choice] if is_first and self.cached_tokens else 0
        return TokenEvent(
            request.request_id,
            tuple(part),
            tuple(logprobs),
            tuple(prompt),
            reason,
            num_cached_tokens=num_cached,
        )

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        ids = [(token_id + step) % self._model.vocab_size for step in range(num_top)]
        return TokenLogprob(token_id, LOGPROBS[0], tuple(zip(ids, LOGPROBS, strict=False)))
