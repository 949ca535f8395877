"""Linear layers of experts that are not quantized: every row meets its expert, and depends on no other row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.experts import SortedRows
from kernels.grouped_dense import grouped_dense
from kernels.reference import sorted_by_expert
from kernels.tiles import grouped_rows
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan

NUM_EXPERTS = 5


def random_numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def plan_of(choices: list[int]) -> SortedRows:
    experts = torch.tensor(choices, dtype=torch.int64, device=DEVICE)
    return sorted_by_expert(experts[:, None], NUM_EXPERTS, grouped_rows(len(choices), NUM_EXPERTS))


def run(x: Tensor, weight: Tensor, choices: list[int]) -> Tensor:
    with fresh_memory_is_nan():
        return grouped_dense(x.to(DEVICE), weight.to(DEVICE), plan_of(choices)).cpu()


@settings(max_examples=6, deadline=None)
@given(
    choices=st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, max_size=40),
    repeats=st.sampled_from([1, 2]),
    num_inputs=st.sampled_from([32, 64, 200]),
    dtype=st.sampled_from(HALF_TYPES),
)
def test_any_spread_over_experts_is_a_linear_layer_each(
    choices: list[int], repeats: int, num_inputs: int, dtype: torch.dtype
) -> None:
    weight = random_numbers(NUM_EXPERTS, 12, num_inputs, dtype=dtype)
    choices = choices * repeats
    x = random_numbers(len(choices) // repeats, num_inputs, dtype=dtype)

    out = run(x, weight, choices)

    rows = x.float().repeat_interleave(repeats, dim=0)
    expected = torch.einsum("ak,ank->an", rows, weight.float()[choices]).to(dtype)
    torch.testing.assert_close(out, expected, rtol=LAST_PLACE[dtype], atol=1e-4)


def test_a_row_has_the_same_bits_whatever_runs_beside_it() -> None:
    weight = random_numbers(NUM_EXPERTS, 8, 160, dtype=torch.float16)
    x = random_numbers(20, 160, dtype=torch.float16)

    together = run(x, weight, [row % 2 for row in range(20)])

    assert torch.equal(run(x[3:4], weight, [1]), together[3:4])


def test_operands_that_do_not_fit_are_refused() -> None:
    weight = random_numbers(NUM_EXPERTS, 8, 64, dtype=torch.float16)
    x = random_numbers(3, 64, dtype=torch.float16)

    with pytest.raises(ValueError, match=r"x must be \[T, 64\]"):
        run(x[:, :32], weight, [0, 0, 1])
    with pytest.raises(ValueError, match=r"contiguous and in x's torch\.float16, not torch\.bfloat16"):
        run(x, weight.bfloat16(), [0, 0, 1])
    with pytest.raises(ValueError, match="routed to 5 experts, and there are 4"):
        run(x, weight[:4], [0, 0, 1])
