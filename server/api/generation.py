"""The one way from a request's choices to their deltas, streamed or not. Knows no reply shapes and no HTTP."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from server.api.choice_text import Choice, ChoiceDelta, ChoiceText, failure_of
from server.api.services import Services
from server.errors import DeadlineExceeded, EngineUnavailable, GenerationFailed, ServerError
from server.metrics import FinishedReason


async def stream_choices(services: Services, choices: Sequence[Choice]) -> AsyncGenerator[ChoiceDelta, None]:
    """The deltas of all choices as they come; each choice's last has a finish reason.

    Ends with the first error of any choice. Closing it aborts what is still under way in the engine.
    """
    streams = [_stream_choice(services, choice) for choice in choices]
    async with aclosing(streams[0] if len(streams) == 1 else _merge(streams)) as deltas:
        async for delta in deltas:
            yield delta


async def _stream_choice(services: Services, choice: Choice) -> AsyncGenerator[ChoiceDelta, None]:
    text = ChoiceText(choice, services.tokenizer)
    started = time.monotonic()
    has_token = False
    outcome: FinishedReason = "abort"
    try:
        async with aclosing(services.engine.generate(choice.request)) as events:
            async for event in events:
                if event.token_ids and not has_token:
                    has_token = True
                    services.metrics.count_first_token(time.monotonic() - started)
                failure = failure_of(event)
                if failure is not None and not event.token_ids:
                    raise failure
                delta = text.push(event)
                if delta.finish_reason is not None:
                    outcome = delta.finish_reason
                if delta.text or delta.pieces or delta.finish_reason is not None:
                    yield delta
                if delta.finish_reason is not None:
                    return
                if failure is not None:
                    raise failure
    except ServerError as error:
        outcome = "timeout" if isinstance(error, DeadlineExceeded) else "error"
        if isinstance(error, GenerationFailed) and services.engine.status().state != "ready":
            # the engine died, which is no fault of the request: the next one will do it
            raise EngineUnavailable(error.message) from error
        raise
    finally:
        services.metrics.count_finished(outcome, time.monotonic() - started)


async def _merge(streams: Sequence[AsyncGenerator[ChoiceDelta, None]]) -> AsyncGenerator[ChoiceDelta, None]:
    """The deltas of several streams in the order they come, at most one of each waiting to be read."""
    waiting = {_next_delta(stream): stream for stream in streams}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                stream = waiting.pop(task)
                delta = task.result()
                if delta is not None:
                    waiting[_next_delta(stream)] = stream
                    yield delta
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


def _next_delta(stream: AsyncGenerator[ChoiceDelta, None]) -> asyncio.Task[ChoiceDelta | None]:
    return asyncio.create_task(_read_next(stream))


async def _read_next(stream: AsyncGenerator[ChoiceDelta, None]) -> ChoiceDelta | None:
    return await anext(stream, None)
