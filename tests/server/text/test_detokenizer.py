"""Increments join to the decoded whole, whatever the tokens, and never show half a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.detokenizer import MAX_HELD_TOKENS, REPLACEMENT, Detokenizer
from server.text.tokenizer import Tokenizer

TINY_VOCAB_SIZE, MERGED_VOCAB_SIZE = 272, 379
NUM_HIGH_BYTES = 128


def high_byte_ids(tokenizer: Tokenizer) -> list[int]:
    """The tiny tokenizer's tokens for the bytes from 0x80, most of which no text has alone."""
    return [token_id for token_id in range(256) if tokenizer.token_bytes(token_id)[0] >= 0x80]


def increments(tokenizer: Tokenizer, token_ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


@given(token_ids=st.lists(st.integers(0, TINY_VOCAB_SIZE - 1)), skip=st.booleans())
@settings(deadline=None, max_examples=100)
def test_random_bytes_join_to_the_whole(tiny_tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> None:
    whole = tiny_tokenizer.decode(token_ids, skip_special_tokens=skip)
    assert "".join(increments(tiny_tokenizer, token_ids, skip_special_tokens=skip)) == whole


@given(places=st.lists(st.integers(0, NUM_HIGH_BYTES - 1), min_size=MAX_HELD_TOKENS, max_size=5 * MAX_HELD_TOKENS))
@settings(deadline=None, max_examples=40)
def test_long_runs_of_broken_text_join_to_the_whole(tiny_tokenizer: Tokenizer, places: list[int]) -> None:
    token_ids = [high_byte_ids(tiny_tokenizer)[place] for place in places]
    whole = tiny_tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(increments(tiny_tokenizer, token_ids)) == whole


@given(token_ids=st.lists(st.integers(0, MERGED_VOCAB_SIZE - 1)))
@settings(deadline=None, max_examples=100)
def test_random_tokens_with_merges_join_to_the_whole(merged_tokenizer: Tokenizer, token_ids: list[int]) -> None:
    whole = merged_tokenizer.decode(token_ids, skip_special_tokens=True)
    assert "".join(increments(merged_tokenizer, token_ids)) == whole


@given(text=st.text(min_size=1))
@settings(deadline=None, max_examples=50)
def test_no_increment_of_whole_text_shows_half_a_character(tiny_tokenizer: Tokenizer, text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    token_ids = tiny_tokenizer.encode(text, add_special_tokens=False)
    assert REPLACEMENT not in "".join(increments(tiny_tokenizer, token_ids))


def test_a_character_appears_with_its_last_byte(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("a€b", add_special_tokens=False)
    assert increments(tiny_tokenizer, token_ids) == ["a", "", "", "€", "b", ""]


def test_half_a_character_at_the_end_is_shown_as_broken(tiny_tokenizer: Tokenizer) -> None:
    token_ids = tiny_tokenizer.encode("a€", add_special_tokens=False)
    assert increments(tiny_tokenizer, token_ids[:-1]) == ["a", "", "", REPLACEMENT]


def test_an_endless_run_of_broken_text_is_shown_in_time(tiny_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny_tokenizer)
    token_id = high_byte_ids(tiny_tokenizer)[-1]
    shown = "".join(detokenizer.push(token_id) for _ in range(10 * MAX_HELD_TOKENS))
    assert len(shown) >= 9 * MAX_HELD_TOKENS


@pytest.mark.parametrize(("skip", "expected"), [(True, "ab"), (False, "a<|im_end|>b")])
def test_special_tokens_are_shown_only_if_asked_for(tiny_tokenizer: Tokenizer, skip: bool, expected: str) -> None:
    token_ids = tiny_tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    assert "".join(increments(tiny_tokenizer, token_ids, skip_special_tokens=skip)) == expected
