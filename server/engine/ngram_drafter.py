"""Guesses what comes next from where the last few tokens stood before (prompt look-up): no second model, no state.

As in Saxena, "Prompt Lookup Decoding" (2023), and vLLM's ngram method.
"""

from itertools import count

import numpy as np

from server.engine.step_plan import TokenIds

# how many tokens must be as they were: of several such places the one with most is likeliest to go on alike
_LONGEST_NGRAM = 4
_SHORTEST_NGRAM = 2
# of a long prompt its end is looked at: everybody waits while it is, and each token takes half a kilobyte
_MAX_INDEXED = 8192


class NgramDrafter:
    """An index of one sequence's n-grams, which grows with it: a draft costs the tokens since the last, not all."""

    def __init__(self) -> None:
        # by n, where the token after the last occurrence of each n-gram stands
        self._followers: dict[int, dict[tuple[int, ...], int]] = {
            n: {} for n in range(_LONGEST_NGRAM, _SHORTEST_NGRAM - 1, -1)
        }
        self._num_indexed = 0

    def draft(self, token_ids: TokenIds, num_tokens: int) -> TokenIds:
        """num_tokens tokens that may follow, int64; none where the last tokens have not stood anywhere before.

        token_ids: all tokens of the sequence; those of earlier calls must not have changed since. A repetition shorter
        than the draft is drafted as often as it fits.
        """
        self._index(token_ids)
        last = tuple(token_ids[-_LONGEST_NGRAM:].tolist())
        for n, followers in self._followers.items():
            follower = followers.get(last[-n:])
            if follower is not None:
                return np.resize(token_ids[follower : follower + num_tokens], num_tokens)
        return token_ids[:0]

    def _index(self, token_ids: TokenIds) -> None:
        """Every n-gram that has a follower, but for those before the last _MAX_INDEXED of what is new."""
        for n, followers in self._followers.items():
            start = max(self._num_indexed - n, len(token_ids) - _MAX_INDEXED, 0)
            tokens = token_ids[start:-1].tolist()
            ngrams = zip(*(tokens[offset:] for offset in range(n)), strict=False)
            followers.update(zip(ngrams, count(start + n), strict=False))
        self._num_indexed = len(token_ids)
