"""The body of /v1/chat/completions, checked, and the shapes of its replies."""

from typing import Annotated, Literal, NotRequired, TypedDict

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from server.api.errors import describe
from server.api.sampling_fields import MAX_LOGPROBS, SamplingFields
from server.api.usage import Usage

MAX_MESSAGES = 4096


def _parse_content(value: object) -> object:
    """A string, or a list of text parts, joined by line ends as other servers do it; null is looked at later."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must have a string or a list of text parts as content, not {describe(value)}")
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                'messages may have content parts of the form {"type": "text", "text": ...} only, '
                f"as this model reads text alone, and one is {describe(part)}"
            )
        texts.append(part["text"])
    return "\n".join(texts)


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    # null is an assistant's who had nothing to say, as OpenAI writes one that only called tools
    content: Annotated[str | None, BeforeValidator(_parse_content)] = None
    name: str | None = None

    @model_validator(mode="after")
    def _check_message(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise ValueError(
                f"messages must have a string or a list of text parts as content, and {self.role}'s has none"
            )
        for name in ("tool_calls", "function_call", "audio"):
            if (self.model_extra or {}).get(name):
                raise ValueError(f"messages with {name} are not supported by this server; leave it out")
        return self

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: the newer name `developer` is their `system`."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content or ""}


class ChatBody(SamplingFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("messages")
    @classmethod
    def _check_order(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        if [message.role for message in messages[-2:]] == ["assistant", "assistant"]:
            raise ValueError("messages must not end with two of the assistant; join them, or let the user speak last")
        return messages

    @model_validator(mode="after")
    def _check_chat(self) -> "ChatBody":
        if self.max_tokens == 0:
            raise ValueError("max_tokens must be at least 1")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    @property
    def name_of_limit(self) -> str:
        """The newer name wins."""
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ReplyMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ReplyMessage
    logprobs: orjson.Fragment | None
    finish_reason: Literal["stop", "length"] | None


class MessageDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChunkChoice(TypedDict):
    index: int
    delta: MessageDelta
    logprobs: orjson.Fragment | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(TypedDict):
    """One frame of a stream. `usage` is there if it was asked for, and null until the last frame."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[Usage | None]
