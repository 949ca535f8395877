"""A sequence guesses as far as it pays: no further, not where nothing comes true, and again when it does."""

import random

import pytest

from server.engine.draft_length import DraftCost, DraftLength, Speculation


def speed_of(acceptance: float, row_cost: float, num_steps: int, rng: random.Random) -> float:
    """Tokens for the time of a step without guesses, by the model of Speculation, where guesses are always found."""
    length = DraftLength()
    tokens = time = 0.0
    for _ in range(num_steps):
        num_drafted = length.choose(8, DraftCost(row_cost))
        num_accepted = 0
        while num_accepted < num_drafted and rng.random() < acceptance:
            num_accepted += 1
        if num_drafted:
            length.note(num_drafted, num_accepted)
        tokens += 1 + num_accepted
        time += 1 + row_cost * num_drafted
    return tokens / time


@pytest.mark.parametrize("row_cost", [0.001, 0.02, 0.2, 0.5, 0.9])
def test_where_nothing_comes_true_it_costs_less_than_a_twentieth(row_cost: float) -> None:
    assert speed_of(0.0, row_cost, 100, random.Random(0)) > 0.95


@pytest.mark.parametrize("row_cost", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("acceptance", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_it_is_never_much_slower(row_cost: float, acceptance: float) -> None:
    assert speed_of(acceptance, row_cost, 2000, random.Random(0)) > 0.95


def test_it_pays_where_guesses_come_true() -> None:
    # eight guesses a step: 9 tokens for 1 + 8 * 0.2
    assert speed_of(1.0, 0.2, 100, random.Random(0)) == pytest.approx(9 / 2.6, rel=0.05)


def test_it_tries_again_after_a_while_and_goes_on_if_that_comes_true() -> None:
    length = DraftLength()
    # given a text that came true in nothing
    for _ in range(200):
        num_drafted = length.choose(8, DraftCost(0.2))
        if num_drafted:
            length.note(num_drafted, 0)
    # when all comes true from now on
    drafted = []
    for _ in range(60):
        drafted.append(length.choose(8, DraftCost(0.2)))
        if drafted[-1]:
            length.note(drafted[-1], drafted[-1])
    assert drafted[-20:] == [8] * 20


def test_a_request_at_its_end_guesses_nothing() -> None:
    assert [DraftLength().choose(longest, DraftCost(0.01)) for longest in (0, -1)] == [0, 0]


def test_the_more_sequences_share_a_step_the_dearer_a_guess_for_each() -> None:
    speculation = Speculation(num_tokens=8, row_cost=0.2)
    assert speculation.relative_cost(1, 1).guess == pytest.approx(0.2)
    # a step of eight takes 2.4 times as long as one of one, and eight more rows 1.6
    assert speculation.relative_cost(8, 8).guess == pytest.approx(1.6 / 2.4)
    # beside a chunk of a prompt one more row is next to nothing
    assert speculation.relative_cost(1, 513).guess < 0.002
