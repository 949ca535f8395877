"""What guesses the tokens that come next, for all sequences of a step at once: the interface, and prompt look-up."""

from collections.abc import Mapping
from typing import Protocol

from server.engine.ngram_drafter import NgramDrafter
from server.engine.sequence import Sequence
from server.engine.step_plan import TokenIds


class Drafter(Protocol):
    """Guesses change no output, so a drafter may always give fewer than it is asked for."""

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, TokenIds]:
        """Guesses at what follows the known tokens, int64, at most wanted[sequence] and at least one each."""

    def stop(self, sequence: Sequence) -> None:
        """A sequence does not run any more: keep nothing of it."""


class PromptLookup:
    """A Drafter that reads each sequence's own text."""

    def __init__(self) -> None:
        self._drafters: dict[Sequence, NgramDrafter] = {}

    def draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, TokenIds]:
        drafts = {}
        for sequence, num_tokens in wanted.items():
            drafter = self._drafters.get(sequence)
            if drafter is None:
                drafter = self._drafters[sequence] = NgramDrafter()
            guesses = drafter.draft(sequence.token_ids, num_tokens)
            if len(guesses):
                drafts[sequence] = guesses
        return drafts

    def stop(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence, None)
