"""What /v1/chat/completions does: messages to choices, choices' deltas to frames or one reply. Knows no HTTP."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

import orjson

from server.api.chat.schema import ChatBody, ChatChoice, ChatChunk, ChatCompletion, ChunkChoice, MessageDelta
from server.api.choice_text import Choice, ChoiceDelta
from server.api.generation import stream_choices
from server.api.logprobs import as_json, chat_logprobs, num_entries
from server.api.prompt import FieldNames, choose_max_tokens, compute, encode_prompt
from server.api.sampling_fields import (
    INT64,
    LogprobCounts,
    Sender,
    check_num_choices,
    generation_request,
    sampling_params,
    stop_strings,
)
from server.api.services import Services
from server.api.sse import frame
from server.api.unsupported_fields import FOR_CHATS
from server.api.usage import Usage, UsageCounter
from server.engine.request import ModelInfo
from server.errors import InvalidRequest


@dataclass(frozen=True)
class ChatJob:
    """A checked request. model: the name for its reply."""

    id: str
    created: int
    model: str
    body: ChatBody
    choices: tuple[Choice, ...]
    num_prompt_tokens: int


async def prepare(body: ChatBody, services: Services, tenant: str) -> ChatJob:
    """Check all of a request before any of it runs. tenant: who asks, by key.

    Raises InvalidRequest, NotFound and EngineUnavailable.
    """
    chosen = await services.choose_model(body.model)
    services.metrics.count_unknown_fields(body.unknown_fields(FOR_CHATS))
    check_num_choices(1, body.num_choices, services.settings)
    model = services.loaded_model()
    sender = Sender(tenant, time.monotonic(), chosen.adapter)
    size = sum(len(message.content or "") for message in body.messages)
    return await compute(size, lambda: _plan(body, services, model, sender, chosen.name))


def _plan(body: ChatBody, services: Services, model: ModelInfo, sender: Sender, name: str) -> ChatJob:
    if services.chat_template is None:
        raise InvalidRequest(
            f"the model {services.served_model.name!r} has no chat template; use /v1/completions", param="messages"
        )
    text = services.chat_template.render([message.for_template() for message in body.messages])
    # the template has written the tokens that begin and end things
    prompt = encode_prompt(services.tokenizer, text, model, add_special_tokens=False, param="messages")
    names = FieldNames("messages", body.name_of_limit)
    max_tokens = choose_max_tokens(prompt, model, requested=body.requested_tokens, default=None, names=names)
    counts = LogprobCounts(output=(body.top_logprobs or 0) if body.logprobs else None, prompt=None)
    sampling = sampling_params(body, model, max_tokens, counts)
    stops, seed = stop_strings(body, services.settings), body.base_seed()
    job_id = f"chatcmpl-{uuid.uuid4().hex}"
    choices = tuple(
        Choice(
            index=index,
            request=generation_request(
                f"{job_id}-{index}", prompt, replace(sampling, seed=(seed + index) % INT64), body, sender
            ),
            stops=stops,
            includes_stop=bool(body.include_stop_str_in_output),
            skips_special_tokens=body.skips_special_tokens,
        )
        for index in range(body.num_choices)
    )
    return ChatJob(job_id, int(time.time()), name, body, choices, len(prompt))


async def whole_chat(job: ChatJob, services: Services) -> ChatCompletion:
    """The reply that is not streamed: the stream, joined."""
    deltas: list[list[ChoiceDelta]] = [[] for _ in job.choices]
    counter = UsageCounter(job.num_prompt_tokens, job.body.num_choices)
    async with aclosing(stream_choices(services, job.choices)) as stream:
        async for delta in stream:
            deltas[delta.index].append(delta)
            counter.note(delta)
    return {
        "id": job.id,
        "object": "chat.completion",
        "created": job.created,
        "model": job.model,
        "choices": [await _choice(job, services, of_choice) for of_choice in deltas],
        "usage": counter.usage(),
    }


async def chat_frames(job: ChatJob, services: Services) -> AsyncGenerator[bytes, None]:
    """Per choice a frame with the role, its text, and a last one with the finish reason; then the usage if asked."""
    counter = UsageCounter(job.num_prompt_tokens, job.body.num_choices)
    started: set[int] = set()
    async with aclosing(stream_choices(services, job.choices)) as stream:
        async for delta in stream:
            counter.note(delta)
            usage = counter.usage() if job.body.includes_usage_always else None
            if delta.index not in started:
                started.add(delta.index)
                opening: ChunkChoice = _chunk_choice(delta.index, {"role": "assistant", "content": ""})
                yield frame(_chunk(job, [opening], usage))
            if delta.text or delta.pieces:
                logprobs = await _logprobs(job, services, [delta])
                spoken: ChunkChoice = _chunk_choice(delta.index, {"content": delta.text}, logprobs)
                yield frame(_chunk(job, [spoken], usage))
            if delta.finish_reason is not None:
                closing: ChunkChoice = {**_chunk_choice(delta.index, {}), "finish_reason": delta.finish_reason}
                yield frame(_chunk(job, [closing], usage))
    if job.body.includes_usage:
        yield frame(_chunk(job, [], counter.usage()))


async def _choice(job: ChatJob, services: Services, deltas: list[ChoiceDelta]) -> ChatChoice:
    return {
        "index": deltas[-1].index,
        "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
        "logprobs": await _logprobs(job, services, deltas),
        "finish_reason": deltas[-1].finish_reason,
    }


async def _logprobs(job: ChatJob, services: Services, deltas: list[ChoiceDelta]) -> orjson.Fragment | None:
    if not job.body.logprobs:
        return None
    pieces = [piece for delta in deltas for piece in delta.pieces]
    return await compute(num_entries(pieces), lambda: as_json(chat_logprobs(services.tokenizer, pieces)))


def _chunk_choice(index: int, delta: MessageDelta, logprobs: orjson.Fragment | None = None) -> ChunkChoice:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def _chunk(job: ChatJob, choices: list[ChunkChoice], usage: Usage | None) -> ChatChunk:
    chunk: ChatChunk = {
        "id": job.id,
        "object": "chat.completion.chunk",
        "created": job.created,
        "model": job.model,
        "choices": choices,
    }
    return {**chunk, "usage": usage} if job.body.includes_usage else chunk
