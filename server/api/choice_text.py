"""One choice's tokens to what the client sees of it: text, where each token starts in it, and why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.engine.request import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from server.errors import DeadlineExceeded, EngineUnavailable, GenerationFailed, ServerError
from server.text.detokenizer import Detokenizer
from server.text.stop_strings import StopStrings
from server.text.tokenizer import Tokenizer

# of a reply that is whole; the other reasons are failures
_WHOLE: dict[FinishReason | None, Literal["stop", "length"]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt that the reply repeats. token_offsets: where each of its tokens starts in the text."""

    text: str
    token_offsets: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """One choice of a request: what the engine is asked, and what its text is made to look like.

    discards_output: the client wants the prompt only, and the engine's one token is dropped.
    """

    index: int
    request: GenerationRequest
    stops: tuple[str, ...]
    includes_stop: bool
    skips_special_tokens: bool
    discards_output: bool = False
    echo: EchoedPrompt | None = None


@dataclass(frozen=True)
class TokenPiece:
    """One token of a reply. logprob None: nothing predicts the prompt's first token. text_offset: in characters."""

    token_id: int
    text_offset: int
    logprob: TokenLogprob | None


@dataclass(frozen=True)
class ChoiceDelta:
    """What is new of one choice. pieces: tokens whose text has been shown, when log-probabilities were asked for.

    num_tokens: how many tokens of output the choice has used so far. num_cached_tokens: how many of its prompt were not
    computed for it. finish_reason: set on its last delta.
    """

    index: int
    text: str
    pieces: tuple[TokenPiece, ...]
    num_tokens: int
    num_cached_tokens: int
    finish_reason: Literal["stop", "length"] | None


class ChoiceText:
    """Builds one choice's deltas from its events. A token's text is shown once it cannot become a stop string."""

    def __init__(self, choice: Choice, tokenizer: Tokenizer) -> None:
        prompt = choice.request.prompt_token_ids
        self._choice = choice
        self._detokenizer = Detokenizer(
            tokenizer, context=tokenizer.context_of(prompt), skip_special_tokens=choice.skips_special_tokens
        )
        self._stops = StopStrings(choice.stops)
        self._num_tokens = self._num_cached_tokens = 0
        # pieces wait here until the text they start in is shown
        self._pieces: list[TokenPiece] = []
        self._num_decoded = self._num_shown = 0
        self._is_first = True

    def push(self, event: TokenEvent) -> ChoiceDelta:
        """The delta for the tokens of one event; `failure_of` tells what it reports as failed after them."""
        self._num_cached_tokens += event.num_cached_tokens
        text = self._echo(event) if self._is_first else ""
        self._is_first = False
        if self._choice.discards_output:
            return self._delta(text, "length" if event.finish_reason in _WHOLE else None)
        for position, token_id in enumerate(event.token_ids):
            logprob = event.logprobs[position] if event.logprobs else None
            shown, has_stopped = self._push_token(token_id, logprob, is_end=_is_end_token(event, position))
            text += shown
            if has_stopped:
                return self._delta(text, "stop", is_cut=True)
        finish_reason = _WHOLE.get(event.finish_reason)
        if finish_reason is None:
            return self._delta(text, None)
        shown, has_stopped = self._search(self._detokenizer.finish())
        if has_stopped:
            return self._delta(text + shown, "stop", is_cut=True)
        rest = shown + self._stops.finish()
        return self._delta(text + rest, finish_reason)

    def _push_token(self, token_id: int, logprob: TokenLogprob | None, *, is_end: bool) -> tuple[str, bool]:
        self._num_tokens += 1
        self._pieces.append(TokenPiece(token_id, self._num_decoded, logprob))
        # the token that ends a text is no part of it
        decoded = "" if is_end else self._detokenizer.push(token_id)
        self._num_decoded += len(decoded)
        if self._num_tokens < self._choice.request.sampling.min_tokens:
            return decoded, False
        return self._search(decoded)

    def _search(self, decoded: str) -> tuple[str, bool]:
        """What of the text may be shown, and whether a stop string ended it."""
        match = self._stops.push(decoded)
        if match.stop is None:
            return match.text, False
        return match.text + (match.stop if self._choice.includes_stop else ""), True

    def _echo(self, event: TokenEvent) -> str:
        echo = self._choice.echo
        if echo is None:
            return ""
        self._num_decoded = len(echo.text)
        if event.prompt_logprobs:
            prompt = self._choice.request.prompt_token_ids
            self._pieces = [
                TokenPiece(token_id, offset, logprob)
                for token_id, offset, logprob in zip(prompt, echo.token_offsets, event.prompt_logprobs, strict=True)
            ]
        return echo.text

    def _delta(
        self, text: str, finish_reason: Literal["stop", "length"] | None, *, is_cut: bool = False
    ) -> ChoiceDelta:
        self._num_shown += len(text)
        if finish_reason is not None and not is_cut:
            num_ready = len(self._pieces)
        else:
            num_ready = sum(piece.text_offset < self._num_shown for piece in self._pieces)
        ready, self._pieces = self._pieces[:num_ready], self._pieces[num_ready:]
        has_logprobs = self._choice.request.sampling.logprobs is not None
        return ChoiceDelta(
            index=self._choice.index,
            text=text,
            pieces=tuple(ready) if has_logprobs else (),
            num_tokens=self._num_tokens,
            num_cached_tokens=self._num_cached_tokens,
            finish_reason=finish_reason,
        )


def failure_of(event: TokenEvent) -> ServerError | None:
    """What the engine reports as failed, aborted or too late, after the event's tokens."""
    match event.finish_reason:
        case FinishReason.ERROR:
            return GenerationFailed(event.error or "the engine failed on this request")
        case FinishReason.ABORTED:
            return EngineUnavailable(event.error or "the server ended this request before it was done")
        case FinishReason.TIMEOUT:
            return DeadlineExceeded(event.error or "the time for this request was over")
        case _:
            return None


def echoed_prompt(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> EchoedPrompt:
    """The text of a prompt's tokens, and where each starts in it."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    parts, offsets, length = [], [], 0
    for token_id in token_ids:
        offsets.append(length)
        parts.append(detokenizer.push(token_id))
        length += len(parts[-1])
    return EchoedPrompt("".join([*parts, detokenizer.finish()]), tuple(offsets))


def _is_end_token(event: TokenEvent, position: int) -> bool:
    return event.finish_reason is FinishReason.STOP and position == len(event.token_ids) - 1
