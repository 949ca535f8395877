"""Codes of 8 bits for keys and values: how near they are, what they do with the ends of the range."""

import pytest
import torch

from kernels.kv_codes import CODE_DTYPES, SMALLEST_AMPLITUDE, decode, encode

DTYPES = pytest.mark.parametrize("dtype", CODE_DTYPES)


def test_an_int8_code_is_within_half_a_step() -> None:
    vectors = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))

    codes, scales = encode(vectors, torch.uint8)

    torch.testing.assert_close(scales, vectors.abs().amax(-1) / 127)
    assert ((decode(codes, scales) - vectors).abs() <= scales[:, None] * 0.5001).all()


def test_an_e4m3_code_keeps_four_bits_of_each_number() -> None:
    vectors = torch.randn(50, 128, generator=torch.Generator().manual_seed(0))

    codes, scales = encode(vectors, torch.float8_e4m3fn)

    # numbers below 2**-6 steps of the scale are 2**-9 of it apart
    error = (decode(codes, scales) - vectors).abs()
    assert (error <= torch.maximum(vectors.abs() * 2.0**-4, scales[:, None] * 2.0**-10) * 1.001).all()


@DTYPES
def test_the_largest_number_of_a_vector_is_kept(dtype: torch.dtype) -> None:
    vectors = torch.tensor([[3.0, -7.0, 0.5], [1e-3, 0.0, 5e-4], [6e4, 1.0, -2.0]])

    numbers = decode(*encode(vectors, dtype))

    torch.testing.assert_close(numbers.abs().amax(-1), vectors.abs().amax(-1))


@DTYPES
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    codes, scales = encode(torch.zeros(2, 8), dtype)

    assert (decode(codes, scales) == 0).all()
    assert (scales > 0).all()


@DTYPES
def test_vectors_too_small_for_a_scale_become_zeros(dtype: torch.dtype) -> None:
    numbers = decode(*encode(torch.full((1, 8), SMALLEST_AMPLITUDE / 2**20), dtype))

    assert (numbers == 0).all()


@DTYPES
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_breaks_its_own_vector_only(value: float, dtype: torch.dtype) -> None:
    vectors = torch.ones(3, 8)
    vectors[1, 5] = value

    numbers = decode(*encode(vectors, dtype))

    assert numbers[1].isnan().all()
    torch.testing.assert_close(numbers[[0, 2]], torch.ones(2, 8))
