"""The planar layout: what is in each word, and that repacking loses nothing."""

import dataclasses

import pytest
import torch

from kernels.layout import WeightLayout, repack_planar, unpack, unpack_planar
from tests.kernels.packed_weights import random_packed_weight

# (N, K, group size): the demo model's K (no multiple of 128), few and odd outputs, every group size
SHAPES = [(8, 576, 64), (1, 32, 32), (130, 96, 32), (128, 256, 128), (257, 1152, 128)]


@pytest.mark.parametrize("shape", SHAPES)
def test_repacking_there_and_back_gives_the_same_weight(shape: tuple[int, int, int]) -> None:
    weight = random_packed_weight(*shape)

    back = unpack_planar(repack_planar(weight))

    assert torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scales, weight.scales)
    assert torch.equal(back.zeros, weight.zeros)
    assert dataclasses.replace(back, codes=weight.codes, scales=weight.scales, zeros=weight.zeros) == weight


@pytest.mark.parametrize("shape", SHAPES)
def test_a_word_holds_four_rows_of_k_that_are_32_apart(shape: tuple[int, int, int]) -> None:
    num_rows, num_columns, _ = shape
    weight = random_packed_weight(*shape)
    codes = unpack(weight).codes

    words = repack_planar(weight).codes

    for k in range(num_columns):
        block, plane, row = k // 128, k % 128 // 32, k % 32
        nibbles = (words[32 * block + row, :num_rows].int() >> (4 * plane)) & 0xF
        assert torch.equal(nibbles, codes[:, k].int())


def test_padding_adds_nothing() -> None:
    planar = repack_planar(random_packed_weight(8, 576, 64))

    assert planar.codes.shape == (5 * 32, 128)
    assert not planar.codes[:, 8:].any()
    # rows 576 to 640 of K are planes 2 and 3 of the last block
    assert not (planar.codes[4 * 32 :].int() & 0xFF00).any()
    for values in (planar.scales, planar.zeros):
        assert values.shape == (10, 128)
        assert not values[9].any()
        assert not values[:, 8:].any()


def test_a_group_size_that_does_not_tile_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="group sizes that are multiples of 32, not 48"):
        repack_planar(random_packed_weight(8, 192, 48))


def test_repacking_takes_the_row_major_layout_only() -> None:
    planar = repack_planar(random_packed_weight(8, 128, 64))

    with pytest.raises(ValueError, match="row_major layout, not planar"):
        repack_planar(planar)
    with pytest.raises(ValueError, match="planar layout, not row_major"):
        unpack_planar(dataclasses.replace(planar, layout=WeightLayout.ROW_MAJOR))


def test_the_extreme_codes_survive() -> None:
    weight = random_packed_weight(8, 128, 32)
    for value in (0x00, 0xFF):
        extreme = dataclasses.replace(weight, codes=torch.full_like(weight.codes, value))

        assert torch.equal(unpack_planar(repack_planar(extreme)).codes, extreme.codes)
