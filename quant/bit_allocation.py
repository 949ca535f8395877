"""Shares a budget of bits among linears by what each would lose with fewer: pure numbers, no model and no weight."""

import heapq
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kernels.weight_kinds import SUPPORTED_BITS, WHOLE_ROW
from quant.checkpoint.stored_module import PackedSpec
from quant.errors import RecipeError
from quant.recipe import GROUP_SIZES
from quant.rounding import SCALE_DTYPE
from quant.scale_search import Grouping

# the kernels read groups that are multiples of this, a row of other lengths is for programs that have none
KERNEL_GROUP = 32


@dataclass(frozen=True)
class Shape:
    """The weight of a linear, [N, K]."""

    num_outputs: int
    num_inputs: int

    def bits_at(self, grouping: Grouping) -> int:
        """What it takes with this grouping: codes, scales and zero points."""
        group_size = self.num_inputs if grouping.group_size == WHOLE_ROW else grouping.group_size
        return PackedSpec(self.num_outputs, self.num_inputs, grouping.bits, group_size, SCALE_DTYPE).num_bits


@dataclass(frozen=True)
class Option:
    """A way to round some linears, what they take then, and what that loses; losses of all options add up."""

    grouping: Grouping
    num_bits: int
    loss: float


@dataclass(frozen=True)
class OptionRange:
    """What a recipe lets a linear have: at least so many bits a code, groups of at most this size.

    largest_group: None where the recipe leaves it open, which allows every size; WHOLE_ROW allows them too.
    """

    min_bits: int
    largest_group: int | None

    def groupings(self, num_inputs: int) -> tuple[Grouping, ...]:
        """Every grouping of a linear with K = num_inputs, none twice: a group as long as a row is one scale a row."""
        sizes = [size for size in GROUP_SIZES if num_inputs % size == 0]
        if self.largest_group is not None and self.largest_group != WHOLE_ROW:
            sizes = [size for size in sizes if size <= self.largest_group]
        elif num_inputs % KERNEL_GROUP == 0 or self.largest_group == WHOLE_ROW:
            sizes = [WHOLE_ROW, *(size for size in sizes if size < num_inputs)]
        return tuple(Grouping(bits, size) for bits in SUPPORTED_BITS if bits >= self.min_bits for size in sizes)


def budget_of(target_bpw: float, shapes: Collection[Shape], allowed: OptionRange) -> int:
    """How many bits all these linears may take together.

    Raises RecipeError, with what is possible, when no choice of groupings comes down, or up, to the target.
    """
    num_weights = sum(shape.num_outputs * shape.num_inputs for shape in shapes)
    sizes = [[shape.bits_at(grouping) for grouping in allowed.groupings(shape.num_inputs)] for shape in shapes]
    smallest, largest = sum(map(min, sizes)), sum(map(max, sizes))
    budget = math.floor(target_bpw * num_weights)
    if smallest <= budget <= largest:
        return budget
    # rounded inwards, so that both ends can be given
    low, high = math.ceil(1000 * smallest / num_weights) / 1000, math.floor(1000 * largest / num_weights) / 1000
    fewer = [bits for bits in SUPPORTED_BITS if bits < allowed.min_bits]
    advice = f"; --bits {fewer[-1]} allows less" if budget < smallest and fewer else ""
    raise RecipeError(
        f"the target is {target_bpw:g} bits per weight; with {allowed.min_bits} bits a code or more, scales and zero "
        f"points counted, this model can have {low:g} to {high:g}{advice}"
    )


def allocate(choices: Sequence[Sequence[Option]], budget_bits: int) -> tuple[Grouping, ...]:
    """One option of each choice, all of them within the budget, so that the sum of losses is small.

    Everyone starts with what takes least. Bits then go to whoever's loss falls most for each of them, along the lower
    convex hull of its options (losses by bits), while they last: the optimum but for the last step's size. The same
    numbers give the same answer; of equals the first is served. Raises ValueError when not even the start fits.
    """
    hulls = [_lower_hull(options) for options in choices]
    left = budget_bits - sum(hull[0].num_bits for hull in hulls)
    if left < 0:
        raise ValueError(f"the smallest options take {-left} bits more than the budget of {budget_bits}")
    reached = [0] * len(hulls)
    steps = [(_slope(*hull[:2]), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        hull, at = hulls[index], reached[index]
        cost = hull[at + 1].num_bits - hull[at].num_bits
        if cost > left:
            continue
        left -= cost
        reached[index] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (_slope(*hull[at + 1 : at + 3]), index))
    return tuple(hull[at].grouping for hull, at in zip(hulls, reached, strict=True))


def _lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that pay, by rising bits: each loses less than the one before, at a price that only rises."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.num_bits, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(cheap: Option, dear: Option) -> float:
    """By how much the loss changes with each bit more: negative on a hull."""
    return (dear.loss - cheap.loss) / (dear.num_bits - cheap.num_bits)
