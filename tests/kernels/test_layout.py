"""Every arrangement of the codes holds the same codes, and what does not fit is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import (
    GroupCodes,
    PackedWeight,
    WeightLayout,
    concatenate_rows,
    pack,
    pack_awq_words,
    pack_words,
    repack_int4_cpu,
    repack_planar,
    unpack,
    unpack_awq_words,
    unpack_int4_cpu,
    unpack_planar,
    unpack_words,
)
from kernels.reference import dequantize
from tests.kernels.packed_weights import random_packed_weight

SHAPES = st.tuples(st.integers(1, 140), st.sampled_from([32, 64, 128]), st.integers(1, 9))


def plain_codes(num_outputs: int = 3, num_inputs: int = 8, group_size: int = 4) -> GroupCodes:
    plain = unpack(random_packed_weight(num_outputs, num_inputs, group_size))
    assert plain.codes.shape == (num_outputs, num_inputs)
    return plain


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.sampled_from([3, 4, 8]), st.integers(0, 2**16))
def test_unpack_gives_back_what_was_packed(
    num_outputs: int, group_size: int, num_groups: int, bits: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = (num_outputs, num_groups)
    codes = torch.randint(0, 2**bits, (num_outputs, group_size * num_groups), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, generator=generator)

    plain = unpack(pack(GroupCodes(codes, scales, zeros, bits=bits, group_size=group_size)))

    assert torch.equal(plain.codes, codes)
    assert torch.equal(plain.zeros, zeros)
    assert torch.equal(plain.scales, scales)


def test_the_low_nibble_is_the_even_column() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    weight = pack(GroupCodes(codes, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), bits=4, group_size=4))

    assert weight.codes.tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize(("bits", "expected"), [(3, [[0x21, 0x07]]), (8, [[1, 2, 7, 0]])])
def test_codes_of_3_bits_lie_in_nibbles_and_of_8_bits_in_bytes(bits: int, expected: list[list[int]]) -> None:
    codes = torch.tensor([[1, 2, 7, 0]], dtype=torch.uint8)
    weight = pack(GroupCodes(codes, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), bits=bits, group_size=4))

    assert weight.codes.tolist() == expected


@given(st.integers(1, 4), st.integers(1, 70), st.sampled_from([3, 4, 8]), st.integers(0, 2**16))
def test_words_hold_the_codes_as_one_stream_of_bits(num_rows: int, num_columns: int, bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (num_rows, num_columns), generator=generator, dtype=torch.uint8)

    words = pack_words(codes, bits)

    # code i is what the bits from i * bits on of the row say, the row read as one long number
    assert words.shape == (num_rows, -(-num_columns * bits // 32))
    for row in range(num_rows):
        stream = sum((word % 2**32) * 2 ** (32 * index) for index, word in enumerate(words[row].tolist()))
        assert stream == sum(code * 2 ** (bits * index) for index, code in enumerate(codes[row].tolist()))
    assert torch.equal(unpack_words(words, bits, num_columns), codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5-bit codes are not supported"),
        ({"bits": 3, "codes": torch.full((3, 8), 8, dtype=torch.uint8)}, "a 3-bit code is 0 to 7; found 8"),
        ({"group_size": 3}, "group size 3 does not divide K=8"),
        ({"codes": torch.full((3, 8), 16, dtype=torch.uint8)}, "a 4-bit code is 0 to 15; found 16"),
        ({"zeros": torch.full((3, 2), 16, dtype=torch.uint8)}, "a 4-bit zero point is 0 to 15; found 16"),
        ({"codes": torch.zeros(3, 8, dtype=torch.int32)}, "codes and zeros must be uint8, not torch.int32"),
        ({"scales": torch.ones(3, 3)}, r"scales and zeros must be \[3, 2\], not \[3, 3\]"),
    ],
)
def test_pack_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    broken = replace(plain_codes(), **change)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=message):
        pack(broken)


def test_an_awq_word_holds_its_columns_in_the_order_of_the_format() -> None:
    # column c of a word lies in nibble [0, 4, 1, 5, 2, 6, 3, 7][c]: the format's own example, written out by hand
    words = pack_awq_words(torch.arange(8, dtype=torch.uint8)[None])

    assert [hex(word & 0xFFFFFFFF) for word in words[0].tolist()] == ["0x75316420"]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**16))
def test_awq_words_round_trip(num_rows: int, num_words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (num_rows, 8 * num_words), generator=generator, dtype=torch.uint8)

    words = pack_awq_words(codes)

    assert words.dtype == torch.int32
    assert torch.equal(unpack_awq_words(words), codes)


def test_awq_words_refuse_a_width_that_is_no_multiple_of_8() -> None:
    with pytest.raises(ValueError, match="N=12 is no multiple of 8"):
        pack_awq_words(torch.zeros(1, 12, dtype=torch.uint8))


def test_joined_rows_are_the_rows_of_the_parts() -> None:
    first, second = random_packed_weight(5, 64, 32, seed=1), random_packed_weight(2, 64, 32, seed=2)

    joined = concatenate_rows([first, second])

    assert joined.shape == (7, 64)
    assert torch.equal(unpack(joined).codes, torch.cat((unpack(first).codes, unpack(second).codes)))
    assert torch.equal(joined.zeros, torch.cat((first.zeros, second.zeros)))


@pytest.mark.parametrize("bits", [3, 8])
def test_joined_rows_keep_their_bits(bits: int) -> None:
    parts = [random_packed_weight(rows, 64, 64, bits=bits, seed=rows) for rows in (5, 2)]

    joined = concatenate_rows(parts)

    assert (joined.bits, joined.group_size) == (bits, 64)
    assert torch.equal(unpack(joined).codes, torch.cat([unpack(part).codes for part in parts]))


@pytest.mark.parametrize(
    "other",
    [random_packed_weight(2, 96, 32), random_packed_weight(2, 64, 64), random_packed_weight(2, 64, 32, bits=3)],
)
def test_weights_that_disagree_are_not_joined(other: PackedWeight) -> None:
    with pytest.raises(ValueError, match="weights that share an input must agree"):
        concatenate_rows([random_packed_weight(5, 64, 32), other])


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_the_int4_cpu_layout_keeps_every_code(shape: tuple[int, int, int]) -> None:
    num_outputs, group_size, num_groups = shape
    weight = random_packed_weight(num_outputs, group_size * num_groups, group_size)

    repacked = repack_int4_cpu(weight)

    assert repacked.layout is WeightLayout.INT4_CPU
    assert torch.equal(unpack_int4_cpu(repacked)[:, :num_outputs].T, unpack(weight).codes)


def test_the_int4_cpu_layout_splits_groups_that_the_op_does_not_read() -> None:
    assert repack_int4_cpu(random_packed_weight(3, 192, 96)).group_size == 32
    assert repack_int4_cpu(random_packed_weight(3, 576, 576)).group_size == 64


def test_the_int4_cpu_layout_refuses_groups_under_32() -> None:
    with pytest.raises(ValueError, match="group sizes that are multiples of 32, not 16"):
        repack_int4_cpu(random_packed_weight(4, 64, 16))


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_the_planar_layout_keeps_every_code(shape: tuple[int, int, int]) -> None:
    num_outputs, group_size, num_groups = shape
    weight = random_packed_weight(num_outputs, group_size * num_groups, group_size)

    restored = unpack_planar(repack_planar(weight))

    assert torch.equal(restored.codes, weight.codes)
    assert torch.equal(restored.zeros, weight.zeros)
    assert torch.equal(restored.scales, weight.scales)


@pytest.mark.parametrize(
    ("num_inputs", "group_size", "read_as"), [(576, 576, 64), (192, 96, 32), (768, 384, 128), (512, 256, 128)]
)
def test_wide_groups_repeat_their_scales_exactly_in_the_planar_layout(
    num_inputs: int, group_size: int, read_as: int
) -> None:
    weight = random_packed_weight(8, num_inputs, group_size)

    restored = unpack_planar(repack_planar(weight))

    assert restored.group_size == read_as
    assert torch.equal(dequantize(restored), dequantize(weight))


@settings(max_examples=15, deadline=None)
@given(SHAPES)
def test_3_bit_codes_are_kept_by_every_run_time_layout(shape: tuple[int, int, int]) -> None:
    num_outputs, group_size, num_groups = shape
    weight = random_packed_weight(num_outputs, group_size * num_groups, group_size, bits=3)

    assert torch.equal(unpack_planar(repack_planar(weight)).codes, weight.codes)
    assert torch.equal(unpack_int4_cpu(repack_int4_cpu(weight))[:, :num_outputs].T, unpack(weight).codes)


def test_8_bit_codes_have_no_layout_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"holds codes of \(3, 4\) bits, not of 8: dequantize the weight"):
        repack_int4_cpu(random_packed_weight(8, 64, 32, bits=8))


@pytest.mark.parametrize("read", [unpack, repack_int4_cpu, repack_planar])
def test_a_run_time_layout_is_not_taken_for_row_major(read: object) -> None:
    assert callable(read)
    with pytest.raises(ValueError, match="row_major"):
        read(repack_int4_cpu(random_packed_weight(4, 64, 32)))
