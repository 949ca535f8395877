"""The events of one request that are made from others, or from its end."""

from collections.abc import Sequence as Events

from server.engine.request import FinishReason, TokenEvent
from server.engine.sequence import Sequence


def event_of_end(sequence: Sequence, reason: FinishReason, error: str) -> TokenEvent:
    return TokenEvent(sequence.request_id, (), finish_reason=reason, error=error)


def timeout_event(sequence: Sequence) -> TokenEvent:
    max_tokens = sequence.request.sampling.max_tokens
    words = f"the time for this request was over after {sequence.num_output} of up to {max_tokens} tokens"
    return event_of_end(sequence, FinishReason.TIMEOUT, words)


def join_events(events: Events[TokenEvent]) -> TokenEvent:
    """One event that says what these, of one request and one step, say one after the other."""
    return events[0]._replace(
        token_ids=tuple([token_id for event in events for token_id in event.token_ids]),
        logprobs=tuple([logprob for event in events for logprob in event.logprobs]),
        finish_reason=events[-1].finish_reason,
        error=events[-1].error,
    )
