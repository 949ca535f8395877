"""Routing to experts: the choice and the sorted rows are the reference's, and wait for nothing on the device."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.experts import Routing, SortedRows
from kernels.fused_routing import route, sorted_by_expert
from tests.kernels.launches import DEVICE, fresh_memory_is_nan

NUM_EXPERTS = 60


def random_logits(num_tokens: int, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, num_experts, generator=generator).to(dtype)


def run_route(logits: Tensor, num_choices: int, *, renormalized: bool) -> Routing:
    with fresh_memory_is_nan():
        routing = route(logits.to(DEVICE), num_choices, renormalized=renormalized)
    return Routing(routing.experts.cpu(), routing.weights.cpu())


def run_sort(experts: Tensor, num_experts: int, max_tile_rows: int) -> SortedRows:
    with fresh_memory_is_nan():
        return sorted_by_expert(experts.to(DEVICE), num_experts, max_tile_rows)


@pytest.mark.parametrize(
    ("num_experts", "num_choices", "renormalized", "dtype"),
    [
        (8, 2, True, torch.bfloat16),
        (NUM_EXPERTS, 4, False, torch.float32),
        (128, 8, True, torch.float16),
        (3, 3, False, torch.bfloat16),
    ],
)
def test_choices_and_weights_are_the_reference(
    num_experts: int, num_choices: int, renormalized: bool, dtype: torch.dtype
) -> None:
    logits = random_logits(5, num_experts, dtype)

    routing = run_route(logits, num_choices, renormalized=renormalized)

    expected = reference.route(logits, num_choices, renormalized=renormalized)
    assert torch.equal(routing.experts, expected.experts)
    torch.testing.assert_close(routing.weights, expected.weights, rtol=1e-5, atol=1e-7)


def test_of_equal_experts_the_first_are_chosen() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]])

    for routing in (run_route(logits, 4, renormalized=True), reference.route(logits, 4, renormalized=True)):
        assert routing.experts.tolist() == [[1, 2, 4, 0]]


def test_logits_that_are_the_first_columns_of_more_are_read_in_place() -> None:
    wider = random_logits(4, NUM_EXPERTS + 1)

    routing = run_route(wider[:, :NUM_EXPERTS], 4, renormalized=False)

    assert torch.equal(routing.experts, reference.route(wider[:, :NUM_EXPERTS], 4, renormalized=False).experts)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_gets_experts_that_exist_and_weights_that_show_it(broken: float) -> None:
    logits = random_logits(3, NUM_EXPERTS)
    logits[1] = broken

    routing = run_route(logits, 4, renormalized=False)

    assert int(routing.experts.min()) >= 0
    assert int(routing.experts.max()) < NUM_EXPERTS
    assert bool(routing.weights[1].isnan().all())
    alone = run_route(logits[[0, 2]], 4, renormalized=False)
    assert torch.equal(routing.weights[[0, 2]], alone.weights)


@settings(max_examples=10, deadline=None)
@given(
    choices=st.lists(st.integers(0, 6), min_size=1, max_size=300),
    max_tile_rows=st.sampled_from([16, 32, 64]),
)
def test_the_order_and_its_tiles_are_the_reference(choices: list[int], max_tile_rows: int) -> None:
    experts = torch.tensor(choices)[:, None]

    plan = run_sort(experts, 7, max_tile_rows)

    expected = reference.sorted_by_expert(experts, 7, max_tile_rows)
    assert torch.equal(plan.order.cpu(), expected.order)
    assert torch.equal(plan.tile_experts.cpu(), expected.tile_experts)
    assert torch.equal(plan.tile_rows.cpu(), expected.tile_rows)


def test_every_assignment_is_in_one_tile_of_its_expert() -> None:
    choices = torch.tensor([3, 0, 3, 3, 1, 3, 3, 0, 3])

    plan = reference.sorted_by_expert(choices[:, None], num_experts=6, max_tile_rows=4)

    seen: list[int] = []
    for expert, (first, last) in zip(plan.tile_experts.tolist(), plan.tile_rows.tolist(), strict=True):
        rows = plan.order[first:last].tolist() if first < last else []
        assert len(rows) <= 4
        assert all(int(choices[row]) == expert for row in rows)
        seen += rows
    assert seen == [1, 7, 4, 0, 2, 3, 5, 6, 8]


def test_the_shapes_do_not_depend_on_the_routing() -> None:
    # so that a captured graph replays any
    spread, crowded = torch.arange(40)[:, None] % 7, torch.zeros(40, 1, dtype=torch.int64)

    plans = [run_sort(experts, 7, 16) for experts in (spread, crowded)]

    assert plans[0].tile_rows.shape == plans[1].tile_rows.shape == (2 + 7, 2)


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="chooses 1 to 6 of 6 experts, not 7"):
        run_route(random_logits(2, 6), 7, renormalized=False)
    with pytest.raises(ValueError, match="neighbours in memory, not 2 elements apart"):
        run_route(random_logits(2, 6)[:, ::2], 2, renormalized=False)
    with pytest.raises(ValueError, match=r"contiguous int64, not torch\.int32"):
        run_sort(torch.zeros(2, 2, dtype=torch.int32), 6, 16)
