"""A grammar library for tests: deterministic automata over token ids, and runners that draw what masks allow."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.engine.request import StructuredOutput
from server.engine.step_plan import SampledToken, SamplingRow
from server.engine.structured_output import TokenMask
from tests.fakes import FAKE_VOCAB_SIZE, RepeatingRunner

FINAL = -1


def bits(token_ids: Sequence[int], vocab_size: int = FAKE_VOCAB_SIZE) -> TokenMask:
    """The mask, int32 [ceil(vocab_size / 32)], that allows these tokens."""
    flags = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    flags[list(token_ids)] = 1
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


def allowed_tokens(mask: TokenMask) -> list[int]:
    return [int(token) for token in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))]


class Automaton:
    """Edges as text, "state token next" a line; from state 0 to FINAL, behind which nothing follows."""

    def __init__(self, source: str) -> None:
        self._edges: dict[int, dict[int, int]] = defaultdict(dict)
        for line in source.splitlines():
            state, token, following = (int(word) for word in line.split())
            self._edges[state][token] = following
        self._states = [0]

    def fill_mask(self, mask: TokenMask) -> None:
        edges = self._edges[self._states[-1]]
        if edges:
            mask |= bits(list(edges))

    def advance(self, token_id: int) -> bool:
        following = self._edges[self._states[-1]].get(token_id)
        if following is not None:
            self._states.append(following)
        return following is not None

    def rollback(self, num_tokens: int) -> None:
        assert num_tokens < len(self._states)
        del self._states[-num_tokens:]

    @property
    def is_finished(self) -> bool:
        return self._states[-1] == FINAL


class CrashingAutomaton(Automaton):
    """Breaks down in the state after its third token."""

    def fill_mask(self, mask: TokenMask) -> None:
        if len(self._states) > 3:
            raise ZeroDivisionError("the library has a defect")
        super().fill_mask(mask)


class Automata:
    """The GrammarBackend. A source that starts with "crash" is one whose matcher breaks down on the way."""

    def start(self, structure: StructuredOutput) -> Automaton:
        if structure.source.startswith("crash"):
            return CrashingAutomaton(structure.source.removeprefix("crash"))
        return Automaton(structure.source)


class MaskedRunner(RepeatingRunner):
    """Draws the first allowed token from the predicted one on, around the end of the vocabulary."""

    def _draw(self, row: SamplingRow, text: NDArray[np.int64]) -> SampledToken:
        drawn = super()._draw(row, text)
        if row.allowed is None or drawn.error is not None:
            return drawn
        allowed = allowed_tokens(row.allowed)
        return SampledToken(next((token for token in allowed if token >= drawn.token_id), allowed[0]))
