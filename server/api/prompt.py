"""Prompts to token ids within the model's context, away from the event loop where that takes time."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from server.engine.request import ModelInfo
from server.errors import ContextLengthExceeded, InvalidRequest
from server.text.tokenizer import Tokenizer

Result = TypeVar("Result")
# more text than this takes milliseconds, which other requests' streams should not wait for
LONG_TEXT_CHARACTERS = 4096
# English has four or five, indented code eight. Tokens of 80 or 128 spaces exist, but a text that fills a whole context
# and averages more than this is blank, so it is refused without reading it, which would take seconds of a core
MAX_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class FieldNames:
    """The fields of a request that its prompt and its limit came in, for errors to name."""

    prompt: str = "prompt"
    limit: str = "max_tokens"


async def compute(size: int, work: Callable[[], Result]) -> Result:
    """Do work on `size` characters, tokens or other entries, in a thread of its own when they are many."""
    return await asyncio.to_thread(work) if size > LONG_TEXT_CHARACTERS else work()


def encode_prompt(
    tokenizer: Tokenizer, text: str, model: ModelInfo, *, add_special_tokens: bool, param: str = "prompt"
) -> tuple[int, ...]:
    """Token ids of a prompt's text. Raises ContextLengthExceeded, and InvalidRequest for a text without tokens."""
    if len(text) > min(tokenizer.longest_token, MAX_CHARACTERS_PER_TOKEN) * model.max_model_len:
        raise ContextLengthExceeded(
            f"this model's context is {model.max_model_len} tokens, and the prompt has {len(text)} characters; "
            "shorten it",
            param=param,
        )
    token_ids = tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    if not token_ids:
        raise InvalidRequest(f"{param} must hold at least one token, and it is empty", param=param)
    return token_ids


def choose_max_tokens(
    prompt: Sequence[int],
    model: ModelInfo,
    *,
    requested: int | None,
    default: int | None,
    names: FieldNames = FieldNames(),
) -> int:
    """How many tokens to generate: as requested if they fit, else the default or less; None is all that fit.

    Raises ContextLengthExceeded with the numbers.
    """
    room = model.max_model_len - len(prompt)
    if room < 1:
        raise ContextLengthExceeded(
            f"this model's context is {model.max_model_len} tokens, and the prompt alone has {len(prompt)}; "
            "shorten it to leave room for an answer",
            param=names.prompt,
        )
    if requested is None:
        return room if default is None else min(default, room)
    if requested > room:
        raise ContextLengthExceeded(
            f"this model's context is {model.max_model_len} tokens, and {len(prompt) + requested} were asked for: "
            f"{len(prompt)} in the prompt and {requested} to generate; shorten the prompt, or set {names.limit} to "
            f"{room} or less",
            param=names.limit,
        )
    return requested
