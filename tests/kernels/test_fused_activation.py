"""The gates of an MLP against the reference: any shape, extreme values, rows that do not disturb one another."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_fused
from kernels.fused_activation import gelu_gate, silu_gate
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan

Gate = Callable[[Tensor], Tensor]
GATES: list[tuple[Gate, Gate]] = [(silu_gate, reference_fused.silu_gate), (gelu_gate, reference_fused.gelu_gate)]
both_gates = pytest.mark.parametrize(("gate", "definition"), GATES, ids=["silu", "gelu"])


def run(gate: Gate, gate_up: Tensor) -> Tensor:
    with fresh_memory_is_nan():
        return gate(gate_up.to(DEVICE)).cpu()


def random_rows(num_rows: int, width: int, dtype: torch.dtype, spread: float) -> Tensor:
    return (torch.randn(num_rows, width, generator=torch.Generator().manual_seed(3)) * spread).to(dtype)


@both_gates
@settings(max_examples=10, deadline=None)
@given(
    num_rows=st.integers(1, 4),
    width=st.one_of(st.sampled_from([1536, 11008]), st.integers(1, 200)),
    dtype=st.sampled_from(HALF_TYPES),
    spread=st.sampled_from([0.1, 3.0, 50.0]),
)
def test_any_shape_is_the_reference(
    gate: Gate, definition: Gate, num_rows: int, width: int, dtype: torch.dtype, spread: float
) -> None:
    gate_up = random_rows(num_rows, 2 * width, dtype, spread)

    # far down its tail GELU is a difference of numbers near 1
    torch.testing.assert_close(run(gate, gate_up), definition(gate_up), rtol=LAST_PLACE[dtype], atol=2e-5)


@both_gates
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_largest_numbers_and_the_smallest(gate: Gate, definition: Gate, dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = torch.tensor([largest, -largest, smallest, -smallest, 0.0, float("inf")], dtype=dtype)
    gate_up = torch.cat((values, torch.full_like(values, 0.5)))[None]

    torch.testing.assert_close(run(gate, gate_up), definition(gate_up), rtol=LAST_PLACE[dtype], atol=0)


@both_gates
def test_what_is_not_finite_stays_in_its_element(gate: Gate, definition: Gate) -> None:
    gate_up = random_rows(3, 256, torch.float16, 1.0)
    clean = run(gate, gate_up)
    gate_up[1, 7] = float("nan")

    out = run(gate, gate_up)

    assert out[1, 7].isnan()
    out[1, 7] = clean[1, 7]
    assert torch.equal(out, clean)


def test_rows_may_lie_apart() -> None:
    wide = random_rows(3, 100, torch.float16, 1.0)

    assert torch.equal(run(silu_gate, wide[:, 20:52]), run(silu_gate, wide[:, 20:52].contiguous()))


def test_no_rows_are_no_launch() -> None:
    assert run(silu_gate, torch.empty(0, 8, dtype=torch.float16)).shape == (0, 4)


def test_operands_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        silu_gate(torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"gate_up must be \[M, 2K\]"):
        gelu_gate(torch.ones(1, 5, dtype=torch.float16))
    with pytest.raises(ValueError, match="neighbours in memory"):
        silu_gate(torch.ones(4, 2, dtype=torch.float16).t())
