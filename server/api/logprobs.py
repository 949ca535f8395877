"""Log-probabilities in the two forms that OpenAI's replies have: parallel lists for completions, objects for chats."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import orjson

from server.api.choice_text import TokenPiece
from server.text.tokenizer import Tokenizer

# JSON has no minus infinity; this is what OpenAI writes for it
LOWEST_LOGPROB = -9999.0
# so many tokens' entries are written in one call, which keeps every other thread waiting: about a millisecond
WRITTEN_TOGETHER = 1024


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]


def num_entries(pieces: Sequence[TokenPiece]) -> int:
    """How much there is to write about some tokens: themselves and their alternatives."""
    return sum(1 + len(piece.logprob.top) for piece in pieces if piece.logprob is not None)


def completion_logprobs(tokenizer: Tokenizer, pieces: Sequence[TokenPiece]) -> CompletionLogprobs:
    """The form of /v1/completions; the prompt's first token has null for both its numbers."""
    return {
        "tokens": [tokenizer.token_text(piece.token_id) for piece in pieces],
        "token_logprobs": [_json_number(piece.logprob.logprob) if piece.logprob else None for piece in pieces],
        "top_logprobs": [_top_by_text(tokenizer, piece) for piece in pieces],
        "text_offset": [piece.text_offset for piece in pieces],
    }


def chat_logprobs(tokenizer: Tokenizer, pieces: Sequence[TokenPiece]) -> ChatLogprobs:
    """The form of /v1/chat/completions."""
    content: list[ChatTokenLogprob] = []
    for piece in pieces:
        if piece.logprob is not None:
            chosen = _top_logprob(tokenizer, piece.token_id, piece.logprob.logprob)
            top = [_top_logprob(tokenizer, *alternative) for alternative in piece.logprob.top]
            content.append({**chosen, "top_logprobs": top})
    return {"content": content}


def as_json(logprobs: CompletionLogprobs | ChatLogprobs) -> orjson.Fragment:
    """The form as JSON, for a reply to hold: those of a long prompt have megabytes, which take long to write.

    In a thread of its own that still lets the others have their turn, as it is written in parts.
    """
    fields: Mapping[str, object] = {**logprobs}
    members = (orjson.dumps(name) + b":" + _in_parts(entries) for name, entries in fields.items())
    return orjson.Fragment(b"{" + b",".join(members) + b"}")


def _in_parts(entries: object) -> bytes:
    assert isinstance(entries, list)
    starts = range(0, len(entries), WRITTEN_TOGETHER)
    # without the brackets of each
    parts = (orjson.dumps(entries[start : start + WRITTEN_TOGETHER])[1:-1] for start in starts)
    return b"[" + b",".join(parts) + b"]"


def _top_by_text(tokenizer: Tokenizer, piece: TokenPiece) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one. Of two that read the same, the other one goes by its id."""
    if piece.logprob is None:
        return None
    by_text = {tokenizer.token_text(piece.token_id): _json_number(piece.logprob.logprob)}
    for token_id, logprob in piece.logprob.top:
        if token_id == piece.token_id:
            continue
        text = tokenizer.token_text(token_id)
        by_text[f"token_id:{token_id}" if text in by_text else text] = _json_number(logprob)
    return by_text


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _json_number(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _json_number(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
