"""The steps that are timed are steps of the engine, and the line through the times is the right one."""

import pytest

from benchmarks.step_overhead import StepCost, fit, measure


def test_every_part_of_a_step_is_timed() -> None:
    cost = measure(3, num_repeats=1)
    assert cost.num_sequences == 3
    assert min(cost.plan, cost.apply, cost.tensors, cost.operands, cost.messages) > 0
    assert cost.scheduling == cost.plan + cost.apply
    assert cost.waiting == pytest.approx(cost.scheduling + cost.operands + cost.messages)


def test_the_line_is_microseconds_a_step_and_a_sequence() -> None:
    costs = [StepCost(count, 20.0 + 1.5 * count, 3.0, 1.0, 2.0, 1.0) for count in (1, 8, 64, 256)]
    assert fit(costs, [cost.plan for cost in costs]) == pytest.approx((20.0, 1.5))
    assert fit(costs, [cost.scheduling for cost in costs]) == pytest.approx((23.0, 1.5))
