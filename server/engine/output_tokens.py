"""Tokens that steps drew become output: appended to their sequences, counted, told as events. Owns no blocks."""

from server.engine.request import FinishReason, TokenEvent, TokenLogprob
from server.engine.sequence import Sequence
from server.engine.step_plan import SampledToken
from server.engine.token_events import event_of_end, join_events


class OutputTokens:
    """What the metrics count of them. An event with a finish reason asks for the end of its sequence."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_prompt_tokens = 0
        self.generation_tokens = 0
        self.num_drafts = 0
        self.draft_tokens = 0
        self.accepted_tokens = 0

    def take(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        if token.error is not None:
            return event_of_end(sequence, FinishReason.ERROR, token.error)
        guide = sequence.guide
        if guide is not None and (error := guide.take(token.token_id)) is not None:
            return event_of_end(sequence, FinishReason.ERROR, error)
        sequence.append_token(token.token_id)
        self.generation_tokens += 1
        params = sequence.request.sampling
        num_output = sequence.num_known - sequence.num_prompt
        finish_reason: FinishReason | None = None
        if (token.token_id in params.stop_token_ids and num_output > params.min_tokens) or (
            guide is not None and guide.is_finished
        ):
            finish_reason = FinishReason.STOP
        elif num_output == params.max_tokens:
            finish_reason = FinishReason.LENGTH
        logprobs = () if token.logprob is None else (token.logprob,)
        prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
        num_cached = 0
        if num_output == 1:
            num_cached = sequence.num_cached_prompt
            self.prompt_tokens += sequence.num_prompt
            self.cached_prompt_tokens += num_cached
            if sequence.scores_prompt:
                prompt_logprobs = (None, *sequence.prompt_logprobs)
        # by position: names cost half as much again, for each token of each request
        return TokenEvent(
            sequence.request_id, (token.token_id,), logprobs, prompt_logprobs, finish_reason, None, num_cached
        )

    def take_verified(self, sequence: Sequence, tokens: list[SampledToken], num_drafted: int) -> TokenEvent:
        """The first token and each that follows a guess which came true, up to the request's end."""
        self.num_drafts += 1
        self.draft_tokens += num_drafted
        events = [self.take(sequence, tokens[0])]
        for token in tokens[1:]:
            if events[-1].finish_reason is not None:
                break
            events.append(self.take(sequence, token))
        self.accepted_tokens += len(events) - 1
        return join_events(events)
