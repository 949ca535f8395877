"""Output that must keep to a structure: which tokens may come next, asked of a matcher that a grammar library makes.

Legend: W = words of a mask, ceil(V / 32) for a vocabulary of V tokens.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from kernels.sampling_batch import MASK_BITS
from server.engine.request import StructuredOutput
from server.errors import InvalidRequest

# int32 [W], bit i of word w set where token 32 w + i may come, as `SamplingBatch.allowed` has it
TokenMask = NDArray[np.int32]
T = TypeVar("T")


class GrammarMatcher(Protocol):
    """Where one output stands in its grammar. Whatever it raises ends its own request and no other."""

    def fill_mask(self, mask: TokenMask) -> None:
        """Set the bits of the tokens that may come next, of a mask int32 [W] of zeros."""

    def advance(self, token_id: int) -> bool:
        """Take the next token; False, and nothing taken, when the grammar does not allow it."""

    def rollback(self, num_tokens: int) -> None:
        """Give back the tokens taken last."""

    @property
    def is_finished(self) -> bool:
        """Whether the output is whole and nothing may follow."""


class GrammarBackend(Protocol):
    """The grammar library, for one model's vocabulary."""

    def start(self, structure: StructuredOutput) -> GrammarMatcher:
        """A matcher at the beginning of an output. Raises for a grammar that is none."""


class OutputGuide:
    """One sequence's matcher, out of which no exception comes: it is kept as the reason to end the request."""

    def __init__(self, matcher: GrammarMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._num_words = -(-vocab_size // MASK_BITS)
        self._masks: list[TokenMask] = []
        self.error: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.error is None and self._ask(lambda: self._matcher.is_finished, otherwise=False)

    def masks(self, num_guesses: int) -> list[TokenMask]:
        """What may come next and, after `cut`, behind each guess; all may where the matcher failed."""
        if not self._masks:
            self._masks.append(self._ask(self._next_mask, otherwise=self._all_ones()))
        return self._masks[: num_guesses + 1]

    def cut(self, guesses: Sequence[int]) -> int:
        """How many of the guesses may come, the first ones. Their masks are `masks` then."""
        self._masks.clear()
        self.masks(0)
        num_taken = 0
        for guess in guesses:
            if not self._advance(guess):
                break
            num_taken += 1
            if self._ask(lambda: self._matcher.is_finished, otherwise=True):
                # nothing may be drawn behind it
                self._roll_back(num_taken)
                return num_taken - 1
            self._masks.append(self._ask(self._next_mask, otherwise=self._all_ones()))
        self._roll_back(num_taken)
        return num_taken if self.error is None else 0

    def take(self, token_id: int) -> str | None:
        """Go on by a token that was drawn. Returns why the request must end, if it must."""
        self._masks.clear()
        if self.error is None and not self._advance(token_id) and self.error is None:
            self.error = f"the output's structure refuses token {token_id}, which it had allowed"
        return self.error

    def _advance(self, token_id: int) -> bool:
        return self.error is None and self._ask(lambda: self._matcher.advance(token_id), otherwise=False)

    def _roll_back(self, num_tokens: int) -> None:
        if num_tokens and self.error is None:
            self._ask(lambda: self._matcher.rollback(num_tokens), otherwise=None)

    def _next_mask(self) -> TokenMask:
        mask = np.zeros(self._num_words, dtype=np.int32)
        self._matcher.fill_mask(mask)
        if not mask.any():
            self.error = "the output's structure allows no token here, so nothing can follow"
            return self._all_ones()
        return mask

    def _all_ones(self) -> TokenMask:
        return np.full(self._num_words, -1, dtype=np.int32)

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        try:
            return question()
        # a grammar library's own, of any kind: one request's grammar must not end the engine
        except Exception as error:
            self.error = f"the output's structure could not be followed: {_describe(error)}"
            return otherwise


def start_guide(structure: StructuredOutput, backend: GrammarBackend | None, vocab_size: int) -> OutputGuide:
    """A guide at the beginning of an output. Raises InvalidRequest for a grammar that the library does not take."""
    if backend is None:
        raise InvalidRequest("this engine runs without a grammar library: ask for no structured output")
    try:
        return OutputGuide(backend.start(structure), vocab_size)
    # as above
    except Exception as error:
        raise InvalidRequest(f"the {structure.kind} cannot be followed: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
