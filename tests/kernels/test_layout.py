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
    repack_int4_cpu,
    repack_planar,
    unpack,
    unpack_awq_words,
    unpack_int4_cpu,
    unpack_planar,
)
from tests.kernels.packed_weights import random_packed_weight

SHAPES = st.tuples(st.integers(1, 140), st.sampled_from([32, 64, 128]), st.integers(1, 9))


def plain_codes(num_outputs: int = 3, num_inputs: int = 8, group_size: int = 4) -> GroupCodes:
    plain = unpack(random_packed_weight(num_outputs, num_inputs, group_size))
    assert plain.codes.shape == (num_outputs, num_inputs)
    return plain


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**16))
def test_unpack_gives_back_what_was_packed(num_outputs: int, group_size: int, num_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = (num_outputs, num_groups)
    codes = torch.randint(0, 16, (num_outputs, group_size * num_groups), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 16, groups, generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, generator=generator)

    plain = unpack(pack(GroupCodes(codes, scales, zeros, bits=4, group_size=group_size)))

    assert torch.equal(plain.codes, codes)
    assert torch.equal(plain.zeros, zeros)
    assert torch.equal(plain.scales, scales)


def test_the_low_nibble_is_the_even_column() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    weight = pack(GroupCodes(codes, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), bits=4, group_size=4))

    assert weight.codes.tolist() == [[0x21, 0x0F]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "5-bit codes are not supported"),
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


@pytest.mark.parametrize("other", [random_packed_weight(2, 96, 32), random_packed_weight(2, 64, 64)])
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


@pytest.mark.parametrize("read", [unpack, repack_int4_cpu, repack_planar])
def test_a_run_time_layout_is_not_taken_for_row_major(read: object) -> None:
    assert callable(read)
    with pytest.raises(ValueError, match="row_major"):
        read(repack_int4_cpu(random_packed_weight(4, 64, 32)))
