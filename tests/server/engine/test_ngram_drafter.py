"""What is guessed from what was said before, and that an index which grows guesses as one made at once."""

import random

import numpy as np
import pytest

from server.engine import ngram_drafter
from server.engine.ngram_drafter import NgramDrafter


def guess(token_ids: list[int], num_tokens: int = 3) -> list[int]:
    return NgramDrafter().draft(np.array(token_ids, dtype=np.int64), num_tokens).tolist()


def test_what_followed_the_same_tokens_before_is_guessed() -> None:
    assert guess([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == [4, 5, 6]


@pytest.mark.parametrize("token_ids", [[1], [1, 2], [1, 2, 3, 4], [1, 2, 9, 2]])
def test_where_no_two_tokens_stand_twice_nothing_is(token_ids: list[int]) -> None:
    assert guess(token_ids) == []


def test_the_last_place_counts_of_those_that_are_alike() -> None:
    assert guess([1, 2, 7, 0, 1, 2, 8, 0, 0, 1, 2], num_tokens=1) == [8]


def test_a_place_that_is_alike_for_longer_counts_before_a_later_one() -> None:
    # after 5, 1, 2 came 7; after 1, 2, later, came 8
    assert guess([5, 1, 2, 7, 1, 2, 8, 5, 1, 2], num_tokens=1) == [7]


def test_a_repetition_is_guessed_to_go_on() -> None:
    assert guess([9, 4, 5, 6, 4, 5], num_tokens=7) == [6, 4, 5, 6, 4, 5, 6]
    assert guess([3, 3, 3], num_tokens=4) == [3, 3, 3, 3]


def test_of_a_long_prompt_the_end_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    token_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert guess(token_ids, num_tokens=1) == [3]
    monkeypatch.setattr(ngram_drafter, "_MAX_INDEXED", 6)
    assert guess(token_ids, num_tokens=1) == []


def test_an_index_that_grew_guesses_what_a_new_one_does() -> None:
    rng = random.Random(0)
    token_ids = np.array(rng.choices(range(4), k=300), dtype=np.int64)
    drafter = NgramDrafter()
    length = 0
    while length < 280:
        length += rng.randint(0, 20)
        known = token_ids[:length]
        assert drafter.draft(known, 5).tolist() == guess(known.tolist(), num_tokens=5)
