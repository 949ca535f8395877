"""What a request used, in tokens."""

from typing import TypedDict

from server.api.choice_text import ChoiceDelta


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class UsageCounter:
    """Adds up one request's tokens from its deltas. A prompt counts once, however many choices it has."""

    def __init__(self, num_prompt_tokens: int, choices_per_prompt: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._choices_per_prompt = choices_per_prompt
        self._num_tokens_by_choice: dict[int, int] = {}
        # by prompt, those that no choice of it had to compute
        self._num_cached: dict[int, int] = {}

    def note(self, delta: ChoiceDelta) -> None:
        self._num_tokens_by_choice[delta.index] = delta.num_tokens
        prompt = delta.index // self._choices_per_prompt
        self._num_cached[prompt] = min(self._num_cached.get(prompt, delta.num_cached_tokens), delta.num_cached_tokens)

    def usage(self) -> Usage:
        num_completion_tokens = sum(self._num_tokens_by_choice.values())
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached.values())},
        }
