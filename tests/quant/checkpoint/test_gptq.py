"""The GPTQ layouts against a packer that follows the tools' published algorithm, one code after another."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.layout import PackedWeight, unpack
from quant.checkpoint.meta import CheckpointFormat
from quant.errors import CheckpointError
from tests.quant.checkpoint.stored_modules import (
    assert_same_weight,
    check_tensors,
    meta_of,
    random_weight,
    read_tensors,
)

V1, V2 = CheckpointFormat.GPTQ_V1, CheckpointFormat.GPTQ_V2
# what GPTQModel subtracts from a word of zero points to write v1: 1 in every field
ONES = {4: 0x11111111, 8: 0x01010101}


def pack_column(codes: Sequence[int], bits: int) -> list[int]:
    """Codes as words, by the definition: code i takes the bits from i * bits on of one long number."""
    number = sum(int(code) * 2 ** (bits * index) for index, code in enumerate(codes))
    return [number // 2 ** (32 * word) % 2**32 for word in range(-(-len(codes) * bits // 32))]


def words_of(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] to int32 [R, C * bits / 32]."""
    words = np.array([pack_column(row.tolist(), bits) for row in codes], dtype=np.uint32)
    return torch.from_numpy(words.view(np.int32))


def pack_gptq(weight: PackedWeight, zeros: Tensor) -> dict[str, Tensor]:
    """The four tensors of a module, with these zero points uint8 [N, G] as they are to be stored."""
    plain = unpack(weight)
    return {
        "qweight": words_of(plain.codes, weight.bits).T.contiguous(),
        "qzeros": words_of(zeros.T, weight.bits),
        "scales": plain.scales.T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // weight.group_size,
    }


def pack_v2(weight: PackedWeight) -> dict[str, Tensor]:
    return pack_gptq(weight, weight.zeros)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(32, 128, 128), (64, 96, 32), (32, 192, 192), (96, 576, 64)])
def test_v2_is_read_exactly(bits: int, shape: tuple[int, int, int]) -> None:
    weight = random_weight(*shape, bits=bits)

    assert_same_weight(read_tensors(pack_v2(weight), meta_of(V2, bits=bits, group_size=shape[2])), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_v1_is_read_exactly_where_zero_points_of_0_have_borrowed_from_their_neighbours(bits: int) -> None:
    # given zero points of every value, 0 among them, and v1 as GPTQModel makes it of v2: whole words minus ones
    weight = random_weight(64, 512, 32, bits=bits)
    assert (weight.zeros == 0).any()
    stored = pack_v2(weight)
    words = stored["qzeros"].numpy().view(np.uint32)
    stored["qzeros"] = torch.from_numpy((words - np.uint32(ONES[bits])).view(np.int32))

    assert_same_weight(read_tensors(stored, meta_of(V1, bits=bits, group_size=32)), weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_v1_stores_the_zero_point_minus_1(bits: int) -> None:
    weight = random_weight(32, 128, 32, bits=bits)
    weight.zeros.clamp_(min=1)

    assert_same_weight(read_tensors(pack_gptq(weight, weight.zeros - 1), meta_of(V1, bits=bits)), weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_v1_zero_point_of_0_has_wrapped_to_the_largest_code_and_is_no_16(bits: int) -> None:
    # given the last field of a row, which no other follows
    weight = random_weight(32, 128, 32, bits=bits)
    weight.zeros.clamp_(min=1)
    weight.zeros[31] = 0
    stored = (weight.zeros.int() - 1).remainder(2**bits).to(torch.uint8)

    assert_same_weight(read_tensors(pack_gptq(weight, stored), meta_of(V1, bits=bits)), weight)


@pytest.mark.parametrize(("bits", "stored_zero", "zero"), [(3, 3, 4), (4, 7, 8), (8, 127, 128)])
def test_symmetric_weights_have_the_middle_as_their_zero_point(bits: int, stored_zero: int, zero: int) -> None:
    weight = random_weight(32, 128, 32, bits=bits)

    read = read_tensors(pack_gptq(weight, torch.full_like(weight.zeros, stored_zero)), meta_of(V1, bits=bits))

    assert (read.zeros == zero).all()


def test_a_4_bit_word_holds_eight_neighbouring_inputs_and_is_negative_with_a_large_last_code() -> None:
    # given an 8 x 128 tile that is 0 but for the first eight inputs of output 2: 1, 2, 3 ... 7, 15
    qweight = torch.zeros(16, 8, dtype=torch.int32)
    qweight[0, 2] = 0xF7654321 - 2**32
    tensors = {
        "qweight": qweight,
        "qzeros": torch.tensor([[0x76543210]], dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }

    plain = unpack(read_tensors(tensors, meta_of(V2, bits=4, group_size=128)))

    assert plain.codes[2, :9].tolist() == [1, 2, 3, 4, 5, 6, 7, 15, 0]
    assert int(plain.codes.sum()) == 43
    assert plain.zeros[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_3_bit_codes_straddle_words() -> None:
    # given 32 inputs that are 0 but for number 10 (bits 30 to 32) and number 21 (bits 63 to 65)
    qweight = torch.zeros(3, 32, dtype=torch.int32)
    qweight[0, 0] = 0b01 * 2**30
    qweight[1, 0] = 0b1 - 2**31
    qweight[2, 0] = 0b10
    tensors = {
        "qweight": qweight,
        "qzeros": torch.zeros(1, 3, dtype=torch.int32),
        "scales": torch.ones(1, 32, dtype=torch.float16),
    }

    codes = unpack(read_tensors(tensors, meta_of(V2, bits=3))).codes

    assert {k: int(code) for k, code in enumerate(codes[0]) if code} == {10: 0b101, 21: 0b101}
    assert not codes[1:].any()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_tensors_decide_the_bits_and_the_groups_where_modules_differ(bits: int) -> None:
    spec = check_tensors(pack_v2(random_weight(32, 192, 64, bits=bits)), meta_of(V2, bits=4))

    assert (spec.bits, spec.group_size, spec.shape) == (bits, 64, (32, 192))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_are_read_in_the_dtype_of_the_model_that_was_quantized(dtype: torch.dtype) -> None:
    weight = random_weight(32, 128, 32, scale_dtype=dtype)

    assert_same_weight(read_tensors(pack_v2(weight), meta_of(V2)), weight)


@pytest.mark.parametrize("index", [None, torch.full((128,), -1, dtype=torch.int32)])
def test_a_group_index_may_be_absent_or_unused(index: Tensor | None) -> None:
    weight = random_weight(32, 128, 32)
    tensors = pack_v2(weight)
    del tensors["g_idx"]

    assert_same_weight(read_tensors({**tensors, **({} if index is None else {"g_idx": index})}, meta_of(V2)), weight)


@pytest.mark.parametrize("order", [torch.arange(127, -1, -1), torch.zeros(64)], ids=["reversed", "too short"])
def test_inputs_out_of_order_are_refused_with_what_to_do(order: Tensor) -> None:
    tensors = {**pack_v2(random_weight(32, 128, 32)), "g_idx": order.int() // 32}

    with pytest.raises(CheckpointError, match=r"layer\.g_idx puts inputs into groups out of order .*take a version"):
        check_tensors(tensors, meta_of(V2))


@pytest.mark.parametrize(
    ("suffix", "wrong", "message"),
    [
        ("qweight", torch.zeros(16, 32).long(), r"layer\.qweight is int64 \[16, 32\]"),
        ("scales", torch.ones(4, 32).int(), r"layer\.scales is int32 \[4, 32\]; the format has a float type"),
        ("scales", torch.ones(4, 16).half(), r"layer\.scales is float16 \[4, 16\]; .*\[4, 32\]"),
        ("scales", torch.ones(3, 32).half(), r"layer\.qzeros is int32 \[4, 4\]; .*\[3, 4\]"),
        ("qzeros", torch.zeros(4, 2).int(), r"layer\.qzeros holds 32 codes in 2 words, 2 bits a code; 3, 4, 8 bits"),
    ],
)
def test_a_wrong_tensor_is_named(suffix: str, wrong: Tensor, message: str) -> None:
    tensors = {**pack_v2(random_weight(32, 128, 32)), suffix: wrong}

    with pytest.raises(CheckpointError, match=message):
        check_tensors(tensors, meta_of(V2))


def test_groups_of_unequal_size_are_refused() -> None:
    tensors = pack_v2(random_weight(32, 192, 96))
    del tensors["g_idx"]

    with pytest.raises(CheckpointError, match="layer is stored in groups of 96, but quantization_config says 128"):
        check_tensors(tensors, meta_of(V2, group_size=128))


def test_scales_that_are_not_finite_are_refused() -> None:
    tensors = pack_v2(random_weight(32, 128, 32))
    tensors["scales"][1, 1] = float("nan")

    with pytest.raises(CheckpointError, match=r"layer\.scales holds values that are not finite"):
        read_tensors(tensors, meta_of(V2))
