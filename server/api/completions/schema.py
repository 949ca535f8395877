"""The body of /v1/completions, checked, and the shapes of its replies."""

from typing import Annotated, Literal, NotRequired, TypedDict

import orjson
from pydantic import Field, PlainValidator, model_validator

from server.api.errors import describe
from server.api.sampling_fields import MAX_LOGPROBS, SamplingFields
from server.api.usage import Usage

Prompt = str | tuple[int, ...]
# no model's context is longer
MAX_TOKEN_IDS = 1 << 20


def _parse_prompts(value: object) -> object:
    """A string, a list of strings, a list of token ids or a list of those, always as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"prompt must be a string, a list of strings or a list of token ids; it is {describe(value)}")
    if not value:
        raise ValueError("prompt must not be an empty list")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_parse_token_ids(item) for item in value)
    return (_parse_token_ids(value),)


def _parse_token_ids(value: list[object]) -> tuple[int, ...]:
    if not value:
        raise ValueError("prompt must hold at least one token id in each list")
    if len(value) > MAX_TOKEN_IDS:
        raise ValueError(f"prompt takes at most {MAX_TOKEN_IDS} token ids in a list, and one has {len(value)}")
    token_ids = tuple(item for item in value if type(item) is int and item >= 0)
    if len(token_ids) < len(value):
        # true and false are ints to Python
        wrong = next(item for item in value if type(item) is not int or item < 0)
        raise ValueError(f"prompt must hold token ids, which are integers from 0, and one is {describe(wrong)}")
    return token_ids


class CompletionBody(SamplingFields):
    # checked whole by its own function: a second look at a million ids would cost as much again
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> "CompletionBody":
        if "" in self.prompt:
            raise ValueError("prompt must not be an empty string")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1, or echo true to get the prompt alone")
        if self.best_of is not None and self.best_of != self.num_choices:
            raise ValueError(
                f"best_of is not supported beyond n, {self.num_choices}; leave it out, or make it the same"
            )
        return self


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: orjson.Fragment | None
    finish_reason: Literal["stop", "length"] | None


class Completion(TypedDict):
    """The whole reply, and each frame of a stream, which has `usage` if it was asked for: null until the last frame."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
