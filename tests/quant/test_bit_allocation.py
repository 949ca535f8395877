"""A budget of bits goes where the loss falls most for it, is never overdrawn, and is refused where it cannot hold."""

import itertools
import random

import pytest

from kernels.weight_kinds import WHOLE_ROW
from quant.bit_allocation import Option, OptionRange, Shape, allocate, budget_of
from quant.errors import RecipeError
from quant.scale_search import Grouping

FOUR, EIGHT = Grouping(4, 64), Grouping(8, 64)


def option(bits: int, num_bits: int, loss: float) -> Option:
    return Option(Grouping(bits, 64), num_bits, loss)


def total(choices: list[list[Option]], chosen: tuple[Grouping, ...]) -> tuple[int, float]:
    taken = [
        next(option for option in options if option.grouping == grouping)
        for options, grouping in zip(choices, chosen, strict=True)
    ]
    return sum(option.num_bits for option in taken), sum(option.loss for option in taken)


def test_the_bits_go_to_the_linear_that_loses_most_without_them() -> None:
    choices = [[option(4, 40, 1.0), option(8, 80, 0.1)], [option(4, 40, 9.0), option(8, 80, 0.9)]]

    assert allocate(choices, 80) == (FOUR, FOUR)
    assert allocate(choices, 120) == (FOUR, EIGHT)
    assert allocate(choices, 160) == (EIGHT, EIGHT)


def test_of_two_that_lose_as_much_the_smaller_one_gets_its_bits_first() -> None:
    choices = [[option(4, 400, 1.0), option(8, 800, 0.1)], [option(4, 40, 1.0), option(8, 80, 0.1)]]

    assert allocate(choices, 860) == (FOUR, EIGHT)


def test_what_one_step_leaves_is_spent_on_a_smaller_one() -> None:
    choices = [[option(4, 400, 9.0), option(8, 800, 0.1)], [option(4, 40, 0.1), option(8, 80, 0.01)]]

    assert allocate(choices, 500) == (FOUR, EIGHT)


def test_an_option_that_takes_more_and_loses_more_is_never_chosen() -> None:
    choices = [[option(3, 30, 1.0), option(4, 40, 2.0), option(8, 80, 0.5)]]

    assert allocate(choices, 70) == (Grouping(3, 64),)
    assert allocate(choices, 80) == (EIGHT,)


def test_among_equals_the_first_is_served() -> None:
    alike = [option(4, 40, 1.0), option(8, 80, 0.1)]

    assert allocate([alike, alike, alike], 170) == (EIGHT, FOUR, FOUR)


def test_the_choice_is_within_the_budget_and_close_to_the_best_there_is() -> None:
    # given problems small enough to try everything
    generator = random.Random(0)
    for _ in range(50):
        choices = [
            [option(bits, bits * width, width * generator.uniform(0.5, 1.5) * 4.0**-bits) for bits in (3, 4, 8)]
            for width in generator.sample(range(10, 60), 6)
        ]
        smallest = sum(options[0].num_bits for options in choices)
        budget = smallest + generator.randint(0, smallest)

        spent, loss = total(choices, allocate(choices, budget))

        every = [tuple(option.grouping for option in taken) for taken in itertools.product(*choices)]
        best = min(loss for cost, loss in (total(choices, chosen) for chosen in every) if cost <= budget)
        # a step that does not fit any more may have been the better one: at most what one step gains is missed
        largest_step = max(options[0].loss - options[-1].loss for options in choices)
        assert spent <= budget
        assert best <= loss <= best + largest_step


def test_a_budget_under_the_smallest_options_is_an_error() -> None:
    with pytest.raises(ValueError, match="the smallest options take 5 bits more than the budget of 35"):
        allocate([[option(4, 40, 1.0)]], 35)


def test_options_are_all_bits_from_the_least_and_all_groups_that_divide() -> None:
    assert OptionRange(4, None).groupings(576) == (
        *(Grouping(4, size) for size in (WHOLE_ROW, 64, 32)),
        *(Grouping(8, size) for size in (WHOLE_ROW, 64, 32)),
    )
    assert {grouping.bits for grouping in OptionRange(3, None).groupings(128)} == {3, 4, 8}


def test_a_group_as_long_as_a_row_is_one_scale_a_row() -> None:
    assert OptionRange(8, None).groupings(64) == (Grouping(8, WHOLE_ROW), Grouping(8, 32))


def test_a_group_size_that_was_asked_for_is_the_largest() -> None:
    assert OptionRange(8, 64).groupings(1024) == (Grouping(8, 64), Grouping(8, 32))
    assert OptionRange(8, WHOLE_ROW).groupings(1024)[0] == Grouping(8, WHOLE_ROW)


def test_scales_and_zero_points_count() -> None:
    # 4 bits a code; a float16 scale and a 4-bit zero point for every 64 of 2 x 128 weights
    assert Shape(2, 128).bits_at(FOUR) == 2 * 128 * 4 + 2 * 2 * (16 + 4)
    assert Shape(2, 128).bits_at(Grouping(8, WHOLE_ROW)) == 2 * 128 * 8 + 2 * (16 + 8)


def test_a_target_is_a_budget_for_all_weights_together() -> None:
    shapes = [Shape(64, 128), Shape(32, 64)]
    assert budget_of(5.0, shapes, OptionRange(4, None)) == 5 * (64 * 128 + 32 * 64)


@pytest.mark.parametrize(
    ("target", "allowed", "sentence"),
    [
        # 4 bits and 20 for a row of 128; 8 bits and 24 for a group of 32
        (4.1, OptionRange(4, None), r"target is 4.1 bits per weight; .* can have 4.157 to 8.75; --bits 3 allows less"),
        (9.0, OptionRange(4, None), r"target is 9 bits per weight; .* can have 4.157 to 8.75$"),
        (3.1, OptionRange(3, None), r"with 3 bits a code or more, .* can have 3.149 to 8.75$"),
        (4.3, OptionRange(4, 64), r"can have 4.313 to 8.75; --bits 3"),
    ],
)
def test_a_target_that_cannot_be_reached_names_what_can(target: float, allowed: OptionRange, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        budget_of(target, [Shape(8, 128)], allowed)


def test_both_ends_of_the_range_can_be_given() -> None:
    shapes = [Shape(8, 128)]
    for target in (4.157, 8.75):
        assert budget_of(target, shapes, OptionRange(4, None)) >= shapes[0].bits_at(Grouping(4, WHOLE_ROW))
