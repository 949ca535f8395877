"""What is timed is the same for both sides, and the ratio says which of them is faster."""

import pytest

from benchmarks.speculation import NUM_NOISE_TOKENS, NUM_PHRASES, PHRASE_TOKENS, SCENARIOS, Measured


def test_rounds_have_requests_of_their_own_and_both_sides_the_same() -> None:
    for scenario in SCENARIOS:
        first, second = scenario.draw("round 0", 16), scenario.draw("round 1", 16)
        assert first == scenario.draw("round 0", 16)
        assert len({request.prompt_token_ids for request in (*first, *second)}) == 2 * scenario.num_sequences
        assert len({request.request_id for request in (*first, *second)}) == 2 * scenario.num_sequences


def test_a_phrase_is_said_several_times_and_noise_is_of_few_words() -> None:
    for scenario in SCENARIOS:
        [prompt, *_] = [request.prompt_token_ids for request in scenario.draw("round 0", 16)]
        assert len(prompt) == PHRASE_TOKENS * NUM_PHRASES
        if scenario.is_noise:
            assert len(set(prompt)) <= NUM_NOISE_TOKENS
        else:
            assert prompt == prompt[:PHRASE_TOKENS] * NUM_PHRASES


def test_a_ratio_above_one_says_that_guessing_is_faster() -> None:
    one = Measured(SCENARIOS[1], 17, guessing_seconds=[1.0, 2.0, 1.0], plain_seconds=[2.0, 3.0, 4.0])
    assert (one.ratio.low, one.ratio.median, one.ratio.high) == (1.5, 2.0, 4.0)
    # eight sequences of 16 tokens after the first
    assert one.speed(one.guessing_seconds).high == pytest.approx(128)
