"""Rounding onto group grids: 0 is always on the grid, codes stay in range, and the stored scale is the one used."""

import pytest
import torch

from kernels.layout import pack
from kernels.reference import dequantize
from kernels.weight_kinds import WHOLE_ROW
from quant.rounding import GroupRange, codes_of, full_range, grid_of, round_onto, round_plainly

BITS = 4


def weight_of(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 32), (5, 576), (7, 96)])
def test_every_value_moves_by_at_most_half_a_step(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape)
    grid = grid_of(full_range(weight, 32), BITS)
    error = (weight - round_onto(weight, grid, BITS)).abs()
    # the ends of a range may lie another half step off, as its zero point is an integer
    assert bool((error <= grid.scales.repeat_interleave(32, dim=1) * 1.01).all())
    assert float(error.mean() / grid.scales.mean()) < 0.3


def test_one_scale_a_row_is_a_group_as_wide_as_the_row() -> None:
    weight = weight_of(4, 96)
    grid = grid_of(full_range(weight, WHOLE_ROW), BITS)
    assert grid.scales.shape == (4, 1)
    assert torch.equal(round_plainly(weight, WHOLE_ROW, BITS), round_plainly(weight, 96, BITS))
    assert codes_of(weight, grid, BITS).group_size == 96


def test_zero_is_always_a_value_of_the_grid() -> None:
    weight = weight_of(4, 64).abs() + 1
    weight[:, ::7] = 0
    assert bool((round_plainly(weight, 64, BITS)[:, ::7] == 0).all())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_is_not_destroyed(sign: int) -> None:
    weight = sign * torch.linspace(1.0, 1.1, 64)[None]
    assert float((round_plainly(weight, 64, BITS) - weight).abs().max()) < 0.04


def test_an_all_zero_group_stays_zero_and_finite() -> None:
    weight = weight_of(2, 64)
    weight[0, :32] = 0
    codes = codes_of(weight, grid_of(full_range(weight, 32), BITS), BITS)
    restored = dequantize(pack(codes))
    assert bool((restored[0, :32] == 0).all())
    assert bool(torch.isfinite(restored).all())
    assert float(codes.scales.min()) > 0


@pytest.mark.parametrize("shrink", [1.0, 0.6])
def test_codes_and_zero_points_stay_in_range_even_where_values_are_clipped(shrink: float) -> None:
    weight = weight_of(9, 96)
    widest = full_range(weight, 32)
    codes = codes_of(weight, grid_of(GroupRange(widest.low * shrink, widest.high * shrink), BITS), BITS)
    assert int(codes.codes.max()) == 15
    assert int(codes.zeros.max()) <= 15


def test_packed_codes_dequantize_to_the_rounded_weight_bit_for_bit() -> None:
    weight = weight_of(6, 128)
    grid = grid_of(full_range(weight, 64), BITS)
    assert torch.equal(dequantize(pack(codes_of(weight, grid, BITS))), round_onto(weight, grid, BITS))
