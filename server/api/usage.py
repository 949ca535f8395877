"""What a request used, in tokens."""

from typing import TypedDict

from server.api.choice_text import ChoiceDelta


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class UsageCounter:
    """Adds up one request's tokens from its deltas. A prompt counts once, however many choices it has."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_tokens_by_choice: dict[int, int] = {}

    def note(self, delta: ChoiceDelta) -> None:
        self._num_tokens_by_choice[delta.index] = delta.num_tokens

    def usage(self) -> Usage:
        num_completion_tokens = sum(self._num_tokens_by_choice.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + num_completion_tokens,
        }
