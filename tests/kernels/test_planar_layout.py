"""The planar layout: what is in each word, and that repacking loses nothing."""

import dataclasses

import pytest
import torch

from kernels.layout import PackedWeight, WeightLayout, planar_on_device, repack_planar, unpack, unpack_planar
from tests.kernels.packed_weights import random_packed_weight

# (N, K, group size): the demo model's K (no multiple of 128), few and odd outputs, every group size
SHAPES = [(8, 576, 64), (1, 32, 32), (130, 96, 32), (128, 256, 128), (257, 1152, 128)]


def assert_same_weight(back: PackedWeight, weight: PackedWeight) -> None:
    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert back.scales.dtype == weight.scales.dtype
    assert torch.equal(back.zeros, weight.zeros)
    assert dataclasses.replace(back, codes=weight.codes, scales=weight.scales, zeros=weight.zeros) == weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [3, 4])
def test_repacking_there_and_back_gives_the_same_weight(shape: tuple[int, int, int], bits: int) -> None:
    weight = random_packed_weight(*shape, bits=bits)

    assert_same_weight(unpack_planar(repack_planar(weight)), weight)


@pytest.mark.parametrize("shape", [(8, 576, 64), (129, 96, 32), (1, 64, 64)])
def test_codes_of_8_bits_come_back_too(shape: tuple[int, int, int]) -> None:
    weight = random_packed_weight(*shape, bits=8)

    assert_same_weight(unpack_planar(repack_planar(weight)), weight)


def test_scales_of_bf16_stay_bf16() -> None:
    weight = random_packed_weight(8, 128, 64)
    weight = dataclasses.replace(weight, scales=weight.scales.to(torch.bfloat16))

    assert_same_weight(unpack_planar(repack_planar(weight)), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_word_holds_four_rows_of_k_that_are_32_apart(shape: tuple[int, int, int]) -> None:
    num_rows, num_columns, _ = shape
    weight = random_packed_weight(*shape)
    codes = unpack(weight).codes

    words = repack_planar(weight).codes

    for k in range(num_columns):
        block, plane, row = k // 128, k % 128 // 32, k % 32
        nibbles = (words[:, block, row].flatten()[:num_rows].int() >> (4 * plane)) & 0xF
        assert torch.equal(nibbles, codes[:, k].int())


def test_a_word_holds_two_codes_of_8_bits_that_are_32_apart() -> None:
    weight = random_packed_weight(130, 96, 32, bits=8)
    codes = unpack(weight).codes

    words = repack_planar(weight).codes

    for k in range(96):
        block, plane, row = k // 64, k % 64 // 32, k % 32
        assert torch.equal((words[:, block, row].flatten()[:130].int() >> (8 * plane)) & 0xFF, codes[:, k].int())


def test_a_pair_holds_a_scale_and_the_zero_point_above_1024() -> None:
    weight = random_packed_weight(130, 256, 64)

    planar = repack_planar(weight)

    assert planar.scales.shape == (2, 4, 128, 2)
    for n, group in ((0, 0), (129, 3)):
        scale, above = planar.scales[n // 128, group, n % 128].tolist()
        assert (scale, above) == (float(weight.scales[n, group]), 1024 + int(weight.zeros[n, group]))
    assert planar.zeros[1, 3, 1] == 1024 + int(weight.zeros[129, 3])


def test_padding_adds_nothing() -> None:
    planar = repack_planar(random_packed_weight(8, 576, 64))

    assert planar.codes.shape == (1, 5, 32, 128)
    assert not planar.codes[..., 8:].any()
    # rows 576 to 640 of K are planes 2 and 3 of the last block
    assert not (planar.codes[:, 4].int() & 0xFF00).any()
    for values in (planar.scales[..., 0], planar.zeros - 1024):
        assert values.shape == (1, 10, 128)
        assert not values[:, 9].any()
        assert not values[..., 8:].any()


@pytest.mark.parametrize(("scale", "dtype"), [(0.0125, torch.float16), (1e-6, torch.bfloat16), (1e6, torch.bfloat16)])
def test_scales_of_float32_are_rounded_to_the_half_type_that_holds_them(scale: float, dtype: torch.dtype) -> None:
    weight = random_packed_weight(8, 64, 32)
    weight = dataclasses.replace(weight, scales=torch.full((8, 2), scale))

    rounded = unpack_planar(repack_planar(weight)).scales

    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), weight.scales, rtol=float(torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_size_that_does_not_tile_a_block_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="group sizes that are multiples of 32, not 48"):
        repack_planar(random_packed_weight(8, 192, 48, bits=bits))


def test_repacking_takes_the_row_major_layout_only() -> None:
    planar = repack_planar(random_packed_weight(8, 128, 64))
    row_major = dataclasses.replace(planar, layout=WeightLayout.ROW_MAJOR)

    with pytest.raises(ValueError, match="row_major layout, not planar"):
        repack_planar(planar)
    with pytest.raises(ValueError, match="planar layout, not row_major"):
        unpack_planar(row_major)
    with pytest.raises(ValueError, match="planar layout, not row_major"):
        planar_on_device(row_major, torch.device("cpu"))


def test_the_extreme_codes_survive() -> None:
    weight = random_packed_weight(8, 128, 32)
    for value in (0x00, 0xFF):
        extreme = dataclasses.replace(weight, codes=torch.full_like(weight.codes, value))

        assert torch.equal(unpack_planar(repack_planar(extreme)).codes, extreme.codes)
