"""RMS norm, alone and after the residual sum, against the reference: any width, extreme values, bits of a row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_fused
from kernels.fused_norm import add_rms_norm, rms_norm
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan

EPSILON = 1e-5


def random_rows(num_rows: int, width: int, dtype: torch.dtype, *, seed: int = 0, spread: float = 1.0) -> Tensor:
    return (torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def norm_weight(width: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(width, generator=torch.Generator().manual_seed(9)) + 0.5).to(dtype)


def norm(x: Tensor, weight: Tensor, epsilon: float = EPSILON) -> Tensor:
    with fresh_memory_is_nan():
        return rms_norm(x.to(DEVICE), weight.to(DEVICE), epsilon).cpu()


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with fresh_memory_is_nan():
        normed, total = add_rms_norm(x.to(DEVICE), residual.to(DEVICE), weight.to(DEVICE), EPSILON)
    return normed.cpu(), total.cpu()


@settings(max_examples=10, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    width=st.one_of(st.sampled_from([1, 128, 576, 896, 1536, 4096, 11008]), st.integers(1, 300)),
    dtype=st.sampled_from(HALF_TYPES),
    spread=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_shape_is_the_reference(num_rows: int, width: int, dtype: torch.dtype, spread: float) -> None:
    x, residual = (random_rows(num_rows, width, dtype, seed=seed, spread=spread) for seed in (1, 2))
    weight = norm_weight(width, dtype)

    alone = norm(x, weight)
    normed, total = add_norm(x, residual, weight)

    expected_normed, expected_total = reference_fused.add_rms_norm(x, residual, weight, EPSILON)
    torch.testing.assert_close(
        alone, reference_fused.rms_norm(x, weight, EPSILON), rtol=LAST_PLACE[dtype], atol=LAST_PLACE[dtype] / 64
    )
    assert torch.equal(total, expected_total)
    torch.testing.assert_close(normed, expected_normed, rtol=LAST_PLACE[dtype], atol=LAST_PLACE[dtype] / 64)


def test_a_worked_example() -> None:
    # given the row (3, 4) with a mean square of 12.5, and its sum with (1, 0), whose mean square is 16
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float16)
    weight = torch.tensor([1.0, 2.0], dtype=torch.float16)

    normed, total = add_norm(x, torch.tensor([[1.0, 0.0]], dtype=torch.float16), weight)

    assert total.tolist() == [[4.0, 4.0]]
    assert normed.tolist() == [[1.0, 2.0]]
    torch.testing.assert_close(norm(x, weight).float(), torch.tensor([[0.8485, 2.2627]]), atol=1e-3, rtol=0)


def test_rows_may_lie_apart() -> None:
    x = random_rows(3, 200, torch.float16)
    weight = norm_weight(64, torch.float16)

    assert torch.equal(norm(x[:, 50:114], weight), norm(x[:, 50:114].contiguous(), weight))


def test_sums_of_squares_that_fp16_could_not_hold() -> None:
    x = torch.full((1, 4096), 60_000.0, dtype=torch.float16)

    assert torch.equal(norm(x, torch.ones(4096, dtype=torch.float16)), torch.ones(1, 4096, dtype=torch.float16))


def test_a_row_of_zeros_is_kept_by_epsilon() -> None:
    assert torch.equal(norm(torch.zeros(1, 576).half(), norm_weight(576, torch.float16)), torch.zeros(1, 576).half())


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_row_has_the_same_bits_whatever_runs_beside_it(dtype: torch.dtype) -> None:
    x, residual = (random_rows(17, 576, dtype, seed=seed) for seed in (1, 2))
    weight = norm_weight(576, dtype)
    together = add_norm(x, residual, weight)

    for row in (0, 7, 16):
        alone = add_norm(x[row : row + 1], residual[row : row + 1], weight)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, together, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    x, residual = (random_rows(3, 96, torch.float16, seed=seed) for seed in (1, 2))
    clean, _ = add_norm(x, residual, norm_weight(96, torch.float16))
    x[1, 5] = value

    normed, _ = add_norm(x, residual, norm_weight(96, torch.float16))

    assert normed[1].isnan().any()
    assert torch.equal(normed[[0, 2]], clean[[0, 2]])


def test_no_rows_are_no_launch() -> None:
    normed, total = add_norm(*(torch.empty(0, 64, dtype=torch.float16),) * 2, norm_weight(64, torch.float16))

    assert normed.shape == total.shape == (0, 64)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = random_rows(2, 64, torch.float16), norm_weight(64, torch.float16)

    with pytest.raises(ValueError, match="float16 or bfloat16"):
        rms_norm(x.float(), weight, EPSILON)
    with pytest.raises(ValueError, match=r"weight must be contiguous \[64\]"):
        rms_norm(x, weight[:32], EPSILON)
    with pytest.raises(ValueError, match=r"x must be \[M, K\] with K from 1 to 32768"):
        rms_norm(x[None], weight, EPSILON)
    with pytest.raises(ValueError, match="neighbours in memory"):
        rms_norm(random_rows(64, 2, torch.float16).t(), weight, EPSILON)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(x, x[:1], weight, EPSILON)
