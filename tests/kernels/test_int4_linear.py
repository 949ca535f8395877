"""Both INT4 kernels against the reference: any shape, the extremes, and rows that do not feel their neighbours."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.gemm_int4 import gemm_int4
from kernels.gemv_int4 import gemv_int4
from kernels.layout import PackedWeight
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan, planar_on_device
from tests.kernels.packed_weights import random_packed_weight

Linear = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
KERNELS = pytest.mark.parametrize("linear", [gemv_int4, gemm_int4], ids=["few_rows", "many_rows"])
# float32 sums of a thousand products, relative to the sum of their magnitudes
SUM_ERROR = 1e-6


def random_rows(num_rows: int, num_columns: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_rows(num_rows: int, num_columns: int) -> Tensor:
    """Small integers: every product and every sum of a group is exact, so only the order of the groups can show."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(-4, 5, (num_rows, num_columns), generator=generator).to(torch.float16)


def run(linear: Linear, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    with fresh_memory_is_nan():
        out = linear(x.to(DEVICE), planar_on_device(weight), None if bias is None else bias.to(DEVICE))
    return out.cpu()


def assert_is_the_reference(out: Tensor, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> None:
    expected = reference.quantized_linear(x, weight, bias)
    magnitudes = float((x.float().abs() @ reference.dequantize(weight).abs().T).max())
    assert out.dtype == x.dtype
    torch.testing.assert_close(out, expected, rtol=LAST_PLACE[x.dtype], atol=SUM_ERROR * magnitudes)


@KERNELS
@settings(max_examples=8, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 8, 9, 17, 64]),
    num_outputs=st.sampled_from([1, 8, 70, 129]),
    group_size=st.sampled_from([32, 64, 128]),
    num_groups=st.integers(1, 5),
    dtype=st.sampled_from(HALF_TYPES),
    with_bias=st.booleans(),
)
def test_any_shape_is_the_reference(
    linear: Linear,
    num_rows: int,
    num_outputs: int,
    group_size: int,
    num_groups: int,
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    weight = random_packed_weight(num_outputs, group_size * num_groups, group_size)
    x = random_rows(num_rows, group_size * num_groups, dtype)
    bias = random_rows(1, num_outputs, dtype, seed=1)[0] if with_bias else None

    assert_is_the_reference(run(linear, x, weight, bias), x, weight, bias)


@KERNELS
@pytest.mark.parametrize("bits", [3, 4])
def test_codes_of_3_bits_and_one_scale_a_row_are_read_by_the_same_kernels(linear: Linear, bits: int) -> None:
    weight = random_packed_weight(16, 192, 192, bits=bits)
    x = random_rows(3, 192, torch.float16)

    assert_is_the_reference(run(linear, x, weight), x, weight)


@KERNELS
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("group_size", [32, 192])
def test_codes_of_8_bits(linear: Linear, dtype: torch.dtype, group_size: int) -> None:
    # 3 blocks of 64; one group a row, and groups of half a block
    weight = random_packed_weight(16, 192, group_size, bits=8)
    x = random_rows(3, 192, dtype)

    assert_is_the_reference(run(linear, x, weight), x, weight)


@KERNELS
def test_every_code_of_8_bits_against_the_extreme_zero_points_is_exact(linear: Linear) -> None:
    weight = random_packed_weight(8, 256, 64, bits=8)
    weight = dataclasses.replace(
        weight,
        codes=torch.arange(256, dtype=torch.uint8).expand(8, -1).contiguous(),
        zeros=torch.tensor([0, 255, 128, 1], dtype=torch.uint8).expand(8, -1).contiguous(),
        scales=torch.ones_like(weight.scales),
    )
    units = torch.eye(256, dtype=torch.float16)

    out = torch.cat([run(linear, rows, weight) for rows in units.split(64)])

    assert torch.equal(out, reference.dequantize(weight).T.to(torch.float16))


@KERNELS
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_scales_of_bf16_and_of_subnormal_size(linear: Linear, dtype: torch.dtype) -> None:
    weight = random_packed_weight(8, 128, 64)
    in_bf16 = dataclasses.replace(weight, scales=weight.scales.to(torch.bfloat16))
    subnormal = dataclasses.replace(weight, scales=weight.scales * 2.0**-14)
    x = random_rows(2, 128, dtype)

    for changed in (in_bf16, subnormal):
        assert_is_the_reference(run(linear, x, changed), x, changed)


@KERNELS
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_the_demo_models_width_which_is_no_multiple_of_a_block(linear: Linear, dtype: torch.dtype) -> None:
    weight = random_packed_weight(8, 576, 64)
    x = random_rows(3, 576, dtype)

    assert_is_the_reference(run(linear, x, weight), x, weight)


@KERNELS
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_long_k_that_is_cut_into_uneven_splits(linear: Linear, dtype: torch.dtype) -> None:
    # 17 blocks in 4 splits of 5: the last has 2
    weight = random_packed_weight(8, 17 * 128, 128)
    x, bias = random_rows(2, 17 * 128, dtype), random_rows(1, 8, dtype, seed=1)[0]

    assert_is_the_reference(run(linear, x, weight, bias), x, weight, bias)


@KERNELS
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("code", "zero"), [(0, 0), (0, 15), (15, 0), (15, 15), (0, 8)])
def test_the_extreme_codes_and_zero_points(linear: Linear, dtype: torch.dtype, code: int, zero: int) -> None:
    weight = random_packed_weight(8, 128, 32)
    weight = dataclasses.replace(
        weight,
        codes=torch.full_like(weight.codes, code * 17),
        zeros=torch.full_like(weight.zeros, zero),
    )
    x = random_rows(2, 128, dtype)

    assert_is_the_reference(run(linear, x, weight), x, weight)


@KERNELS
def test_every_code_against_every_zero_point_is_exact(linear: Linear) -> None:
    # row n, group g: zero point g; a unit vector reads one weight out
    codes = torch.arange(32).remainder(16).repeat(16).expand(8, -1)
    weight = random_packed_weight(8, 512, 32)
    weight = dataclasses.replace(
        weight,
        codes=(codes[:, 0::2] | (codes[:, 1::2] << 4)).to(torch.uint8).contiguous(),
        zeros=torch.arange(16, dtype=torch.uint8).expand(8, -1).contiguous(),
        scales=torch.ones_like(weight.scales),
    )
    units = torch.eye(512, dtype=torch.float16)[::8]

    out = torch.cat([run(linear, rows, weight) for rows in units.split(64)])

    assert torch.equal(out, reference.dequantize(weight).T[::8].to(torch.float16))


def test_a_row_has_the_same_bits_in_every_batch_and_in_both_kernels() -> None:
    # 9 blocks in 2 splits of 5: the last has 4
    weight = random_packed_weight(8, 9 * 128, 128)
    x = exact_rows(64, 9 * 128)
    everything = run(gemv_int4, x, weight)

    for num_rows in range(1, 64):
        assert torch.equal(run(gemv_int4, x[:num_rows], weight), everything[:num_rows])
    more = torch.cat([x, x[:3]])
    assert torch.equal(run(gemm_int4, more, weight)[:64], everything)


@KERNELS
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(linear: Linear, value: float) -> None:
    weight = random_packed_weight(8, 576, 64)
    x = random_rows(4, 576, torch.float16)
    clean = run(linear, x, weight)
    x[2, 575] = value

    out = run(linear, x, weight)

    assert not torch.isfinite(out[2]).any()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


@KERNELS
def test_rows_may_be_a_slice_of_a_wider_tensor(linear: Linear) -> None:
    weight = random_packed_weight(8, 96, 32)
    wide = random_rows(3, 200, torch.float16).to(DEVICE)
    x = wide[:, 40:136]

    with fresh_memory_is_nan():
        out = linear(x, planar_on_device(weight), None)

    assert_is_the_reference(out.cpu(), x.cpu(), weight)


@KERNELS
def test_no_rows_give_no_rows(linear: Linear) -> None:
    assert run(linear, torch.empty(0, 96, dtype=torch.float16), random_packed_weight(8, 96, 32)).shape == (0, 8)


@KERNELS
def test_operands_that_do_not_fit_are_refused(linear: Linear) -> None:
    row_major = random_packed_weight(8, 96, 32)
    weight = planar_on_device(row_major)
    x = random_rows(3, 96, torch.float16).to(DEVICE)

    with pytest.raises(ValueError, match="read the planar layout, not row_major"):
        linear(x, row_major, None)
    with pytest.raises(ValueError, match=r"x must be \[M, 96\]"):
        linear(x[:, :64], weight, None)
    with pytest.raises(ValueError, match=r"x must be \[M, 96\]"):
        linear(x[0], weight, None)
    with pytest.raises(ValueError, match=r"float16 or bfloat16.*float32"):
        linear(x.float(), weight, None)
    with pytest.raises(ValueError, match="neighbours in memory"):
        linear(random_rows(96, 3, torch.float16).to(DEVICE).T, weight, None)
    with pytest.raises(ValueError, match=r"bias must be \[8\]"):
        linear(x, weight, x[0])


def test_the_few_row_kernel_refuses_more_than_64_rows() -> None:
    with pytest.raises(ValueError, match="up to 64 rows, not 65"):
        run(gemv_int4, torch.zeros(65, 96, dtype=torch.float16), random_packed_weight(8, 96, 32))
