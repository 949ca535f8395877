"""What makes a request one that can run: checked by the client before it queues, and once more by the engine."""

import math

from server.engine.request import GenerationRequest, ModelInfo, SamplingParams
from server.errors import ContextLengthExceeded, InvalidRequest


def check_request(request: GenerationRequest, model: ModelInfo) -> None:
    """Raise InvalidRequest or ContextLengthExceeded for a request that the engine could not carry to its end."""
    prompt, params = request.prompt_token_ids, request.sampling
    if request.adapter and request.adapter not in model.adapters:
        raise InvalidRequest(f"there is no adapter {request.adapter!r}", param="model")
    if not prompt:
        raise InvalidRequest("the prompt is empty: it must hold at least one token", param="prompt")
    if params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {params.max_tokens}: it must be at least 1", param="max_tokens")
    num_tokens = len(prompt) + params.max_tokens
    if num_tokens > model.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens and max_tokens asks for {params.max_tokens} more, {num_tokens} "
            f"together: this model's context is {model.max_model_len} tokens",
            param="max_tokens" if len(prompt) < model.max_model_len else "prompt",
        )
    _check_token_ids(prompt, model.vocab_size, "prompt")
    _check_token_ids(params.stop_token_ids, model.vocab_size, "stop_token_ids")
    _check_token_ids(tuple(token_id for token_id, _ in params.logit_bias), model.vocab_size, "logit_bias")
    _check_numbers(params, model.vocab_size)


def _check_token_ids(token_ids: tuple[int, ...], vocab_size: int, param: str) -> None:
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{param} holds token id {wrong}: ids run from 0 to {vocab_size - 1}", param=param)


def _check_numbers(params: SamplingParams, vocab_size: int) -> None:
    numbers = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        **{f"logit_bias of token {token_id}": bias for token_id, bias in params.logit_bias},
    }
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise InvalidRequest(f"{name} is {number}: it must be a finite number", param=name.split()[0])
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and not 0 <= count <= vocab_size:
            raise InvalidRequest(f"{name} is {count}: it must lie between 0 and {vocab_size}", param=name)
