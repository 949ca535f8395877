"""Linear layers of a mixture of experts: every row meets its expert, however the rows are spread."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.experts import PackedExperts, SortedRows, stack_experts
from kernels.fused_routing import sorted_by_expert
from kernels.gemm_int4 import gemm_int4
from kernels.grouped_int4 import grouped_int4, sum_choices
from kernels.layout import PackedWeight
from kernels.tiles import grouped_rows
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan, planar_on_device
from tests.kernels.packed_weights import random_packed_weight


def random_experts(num_experts: int, shape: tuple[int, int, int]) -> tuple[list[PackedWeight], PackedExperts]:
    weights = [random_packed_weight(*shape, seed=seed) for seed in range(num_experts)]
    return weights, stack_experts([planar_on_device(weight) for weight in weights])


def random_rows(num_rows: int, num_columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(x: Tensor, experts: PackedExperts, choices: list[int]) -> Tensor:
    plan = plan_of(choices, experts.num_experts)
    with fresh_memory_is_nan():
        return grouped_int4(x.to(DEVICE), experts, plan).cpu()


def plan_of(choices: list[int], num_experts: int) -> SortedRows:
    experts = torch.tensor(choices, dtype=torch.int64, device=DEVICE)
    return sorted_by_expert(experts[:, None], num_experts, grouped_rows(len(choices), num_experts))


@settings(max_examples=6, deadline=None)
@given(
    choices=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    repeats=st.sampled_from([1, 2]),
    dtype=st.sampled_from(HALF_TYPES),
)
def test_any_spread_over_experts_is_the_reference(choices: list[int], repeats: int, dtype: torch.dtype) -> None:
    weights, experts = random_experts(5, (12, 96, 32))
    choices = choices * repeats
    x = random_rows(len(choices) // repeats, 96, dtype)

    out = run(x, experts, choices)

    expected = reference.grouped_linear(x, weights, torch.tensor(choices))
    torch.testing.assert_close(out, expected, rtol=LAST_PLACE[dtype], atol=2e-5)


def test_a_row_has_the_bits_of_its_expert_alone_whatever_runs_beside_it() -> None:
    weights, experts = random_experts(3, (8, 256, 128))
    x = random_rows(20, 256, torch.float16)
    choices = [a % 2 for a in range(20)]

    out = run(x, experts, choices)

    for expert in (0, 1):
        alone = gemm_int4(x[expert::2].to(DEVICE), planar_on_device(weights[expert])).cpu()
        assert torch.equal(out[expert::2], alone)
    assert torch.equal(run(x[:1], experts, [0]), out[:1])


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_choices_are_weighted_and_summed_in_order(dtype: torch.dtype) -> None:
    choices = random_rows(6, 700, dtype)
    router = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))

    with fresh_memory_is_nan():
        out = sum_choices(choices.to(DEVICE), router.to(DEVICE)).cpu()

    torch.testing.assert_close(out, reference.sum_choices(choices, router), rtol=LAST_PLACE[dtype], atol=1e-6)


def test_no_assignments_give_no_rows() -> None:
    _, experts = random_experts(2, (8, 64, 32))

    assert run(torch.empty(0, 64, dtype=torch.float16), experts, []).shape == (0, 8)


def test_operands_that_do_not_fit_are_refused() -> None:
    weights, experts = random_experts(2, (8, 64, 32))
    x = random_rows(3, 64, torch.float16)

    with pytest.raises(ValueError, match=r"x must be \[T, 64\]"):
        run(x[:, :32], experts, [0, 0, 1])
    with pytest.raises(ValueError, match="4 assignments do not fall evenly on 3 rows"):
        run(x, experts, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="routed to 5 experts, and there are 2"):
        grouped_int4(x, experts, plan_of([0, 0, 0], 5))
    with pytest.raises(ValueError, match="planar layout, not row_major"):
        stack_experts(weights)
    with pytest.raises(ValueError, match="experts of a layer must agree"):
        stack_experts([planar_on_device(weights[0]), planar_on_device(random_packed_weight(8, 128, 32))])
    with pytest.raises(ValueError, match=r"choices must be a contiguous \[6, N\]"):
        sum_choices(x, torch.ones(3, 2))
    with pytest.raises(ValueError, match="contiguous float32"):
        sum_choices(x, torch.ones(3, 1, dtype=torch.float64))
