"""What /v1/completions does: body to choices, choices' deltas to frames or to one reply. Knows nothing of HTTP."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from server.api.choice_text import Choice, ChoiceDelta, EchoedPrompt, echoed_prompt
from server.api.completions.schema import Completion, CompletionBody, CompletionChoice, Prompt
from server.api.generation import stream_choices
from server.api.logprobs import as_json, completion_logprobs, num_entries
from server.api.prompt import choose_max_tokens, compute, encode_prompt
from server.api.sampling_fields import (
    INT64,
    LogprobCounts,
    Sender,
    check_num_choices,
    check_token_ids,
    generation_request,
    sampling_params,
    stop_strings,
)
from server.api.services import Services
from server.api.sse import frame
from server.api.unsupported_fields import FOR_COMPLETIONS
from server.api.usage import UsageCounter
from server.engine.request import ModelInfo
from server.errors import InvalidRequest

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class CompletionJob:
    """A checked request. model: the name for its reply. Choice i of prompt p has the index p * n + i."""

    id: str
    created: int
    model: str
    body: CompletionBody
    choices: tuple[Choice, ...]
    num_prompt_tokens: int


async def prepare(body: CompletionBody, services: Services, tenant: str) -> CompletionJob:
    """Check all of a request before any of it runs. tenant: who asks, by key.

    Raises InvalidRequest, NotFound and EngineUnavailable.
    """
    chosen = await services.choose_model(body.model)
    services.metrics.count_unknown_fields(body.unknown_fields(FOR_COMPLETIONS))
    if len(body.prompt) > services.settings.max_prompts:
        raise InvalidRequest(
            f"prompt takes at most {services.settings.max_prompts} prompts, and it has {len(body.prompt)}",
            param="prompt",
        )
    check_num_choices(len(body.prompt), body.num_choices, services.settings)
    model = services.loaded_model()
    sender = Sender(tenant, time.monotonic(), chosen.adapter)
    size = sum(map(len, body.prompt))
    return await compute(size, lambda: _plan(body, services, model, sender, chosen.name))


def _plan(body: CompletionBody, services: Services, model: ModelInfo, sender: Sender, name: str) -> CompletionJob:
    job_id = f"cmpl-{uuid.uuid4().hex}"
    stops, seed = stop_strings(body, services.settings), body.base_seed()
    choices: list[Choice] = []
    num_prompt_tokens = 0
    for prompt in body.prompt:
        token_ids = _token_ids(prompt, services, model)
        num_prompt_tokens += len(token_ids)
        max_tokens = choose_max_tokens(token_ids, model, requested=body.max_tokens, default=DEFAULT_MAX_TOKENS)
        counts = LogprobCounts(output=body.logprobs, prompt=body.logprobs if body.echo else None)
        # the engine always generates; what was not asked for is dropped
        sampling = sampling_params(body, model, max(max_tokens, 1), counts)
        echo = _echo(body, prompt, token_ids, services) if body.echo else None
        for number in range(body.num_choices):
            index = len(choices)
            own_seed = replace(sampling, seed=(seed + number) % INT64)
            choices.append(
                Choice(
                    index=index,
                    request=generation_request(f"{job_id}-{index}", token_ids, own_seed, body, sender),
                    stops=stops,
                    includes_stop=bool(body.include_stop_str_in_output),
                    skips_special_tokens=body.skips_special_tokens,
                    discards_output=max_tokens == 0,
                    echo=echo,
                )
            )
    return CompletionJob(job_id, int(time.time()), name, body, tuple(choices), num_prompt_tokens)


def _token_ids(prompt: Prompt, services: Services, model: ModelInfo) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return encode_prompt(services.tokenizer, prompt, model, add_special_tokens=True)
    check_token_ids("prompt", prompt, model)
    return prompt


def _echo(body: CompletionBody, prompt: Prompt, token_ids: tuple[int, ...], services: Services) -> EchoedPrompt:
    """A text is repeated as it came; token ids as what they read."""
    echo = echoed_prompt(services.tokenizer, token_ids, skip_special_tokens=body.skips_special_tokens)
    return replace(echo, text=prompt) if isinstance(prompt, str) else echo


async def whole_completion(job: CompletionJob, services: Services) -> Completion:
    """The reply that is not streamed: the stream, joined."""
    deltas: list[list[ChoiceDelta]] = [[] for _ in job.choices]
    counter = UsageCounter(job.num_prompt_tokens, job.body.num_choices)
    async with aclosing(stream_choices(services, job.choices)) as stream:
        async for delta in stream:
            deltas[delta.index].append(delta)
            counter.note(delta)
    choices = [await _choice(job, services, _join(of_choice)) for of_choice in deltas]
    return {**_completion(job, choices), "usage": counter.usage()}


async def completion_frames(job: CompletionJob, services: Services) -> AsyncGenerator[bytes, None]:
    """One frame a delta, and one with the usage at the end if the client asked for it."""
    counter = UsageCounter(job.num_prompt_tokens, job.body.num_choices)
    async with aclosing(stream_choices(services, job.choices)) as stream:
        async for delta in stream:
            counter.note(delta)
            piece = _completion(job, [await _choice(job, services, delta)])
            if job.body.includes_usage:
                piece["usage"] = counter.usage() if job.body.includes_usage_always else None
            yield frame(piece)
    if job.body.includes_usage:
        yield frame({**_completion(job, []), "usage": counter.usage()})


def _join(deltas: list[ChoiceDelta]) -> ChoiceDelta:
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        pieces=tuple(piece for delta in deltas for piece in delta.pieces),
    )


async def _choice(job: CompletionJob, services: Services, delta: ChoiceDelta) -> CompletionChoice:
    logprobs = None
    if job.body.logprobs is not None:
        logprobs = await compute(
            num_entries(delta.pieces), lambda: as_json(completion_logprobs(services.tokenizer, delta.pieces))
        )
    return {
        "index": delta.index,
        "text": delta.text,
        "logprobs": logprobs,
        "finish_reason": delta.finish_reason,
    }


def _completion(job: CompletionJob, choices: list[CompletionChoice]) -> Completion:
    return {
        "id": job.id,
        "object": "text_completion",
        "created": job.created,
        "model": job.model,
        "choices": choices,
    }
