"""The gemv and gemv_fast layouts against packers that follow AutoAWQ's and llm-awq's published algorithms."""

import numpy as np
import numpy.typing as npt
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

# (N, K, group size, words of zero points a row): G / 8 rounded up to 1, 2 or 4 words at groups of 128, 64 or 32
SHAPES = [(8, 128, 128, 1), (8, 128, 64, 2), (12, 128, 32, 4), (16, 576, 64, 2), (8, 1152, 128, 2), (4, 640, 64, 2)]


def pack_gemv(weight: PackedWeight, num_zero_words: int) -> dict[str, Tensor]:
    """WQLinear_GEMV.from_linear: eight codes a word along K, low nibble first; scales padded to the zeros' width."""
    plain = unpack(weight)
    num_outputs, num_inputs = weight.shape
    qweight = np.zeros((num_outputs, num_inputs // 8), dtype=np.uint32)
    for k in range(num_inputs):
        qweight[:, k // 8] |= plain.codes[:, k].numpy().astype(np.uint32) << np.uint32(4 * (k % 8))
    qzeros = np.zeros((num_outputs, num_zero_words), dtype=np.uint32)
    scales = torch.zeros(num_outputs, num_zero_words * 8, dtype=plain.scales.dtype)
    for group in range(plain.zeros.shape[1]):
        qzeros[:, group // 8] |= plain.zeros[:, group].numpy().astype(np.uint32) << np.uint32(4 * (group % 8))
        scales[:, group] = plain.scales[:, group]
    return {"qweight": as_tensor(qweight, np.int32), "qzeros": as_tensor(qzeros, np.int32), "scales": scales}


def pack_gemv_fast(weight: PackedWeight, num_zero_words: int) -> dict[str, Tensor]:
    """pack_intweight of llm-awq, interleave 4, and WQLinear_GEMVFast.from_linear: zero points are -zero * scale."""
    plain = unpack(weight)
    num_outputs, num_inputs = weight.shape
    codes = plain.codes.numpy().astype(np.uint16)
    # within 32 inputs: pairs of neighbours, four pairs apart, then each run of eight as 0 2 4 6 1 3 5 7
    paired = codes.reshape(num_outputs, num_inputs // 32, 4, 4, 2).transpose(0, 1, 3, 2, 4)
    ordered = paired.reshape(num_outputs, num_inputs // 32, 4, 8)
    ordered = ordered.reshape(num_outputs, num_inputs // 32, 4, 4, 2).transpose(0, 1, 2, 4, 3)
    # four rows alternate, 64 inputs at a time
    rows = ordered.reshape(num_outputs // 4, 4, num_inputs // 64, 64).transpose(0, 2, 1, 3)
    nibbles = rows.reshape(num_outputs // 4, num_inputs, 4)
    words = nibbles[..., 0] | nibbles[..., 1] << 4 | nibbles[..., 2] << 8 | nibbles[..., 3] << 12
    scales = torch.zeros(num_zero_words * 8, num_outputs, dtype=plain.scales.dtype)
    scaled_zeros = torch.zeros_like(scales)
    num_groups = plain.zeros.shape[1]
    scales[:num_groups] = plain.scales.T
    scaled_zeros[:num_groups] = -(scales[:num_groups] * plain.zeros.T.to(scales.dtype))
    return {"qweight": as_tensor(words.astype(np.uint16), np.int16), "qzeros": scaled_zeros, "scales": scales}


def as_tensor(words: npt.NDArray[np.unsignedinteger], dtype: type[np.signedinteger]) -> Tensor:
    return torch.from_numpy(words.view(dtype))


PACKERS = {CheckpointFormat.AWQ_GEMV: pack_gemv, CheckpointFormat.AWQ_GEMV_FAST: pack_gemv_fast}


@pytest.mark.parametrize(("num_outputs", "num_inputs", "group_size", "num_zero_words"), SHAPES)
@pytest.mark.parametrize("stored_as", PACKERS)
def test_what_the_tool_packs_is_read_exactly(
    stored_as: CheckpointFormat, num_outputs: int, num_inputs: int, group_size: int, num_zero_words: int
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size)

    read = read_tensors(PACKERS[stored_as](weight, num_zero_words), meta_of(stored_as, group_size=group_size))

    assert_same_weight(read, weight)


def test_a_gemv_word_holds_eight_neighbouring_inputs_low_nibble_first() -> None:
    # given two outputs of 128 inputs, all 0 but the first eight of output 0: 1, 2, 3 ... 8
    qweight = torch.zeros(2, 16, dtype=torch.int32)
    qweight[0, 0] = 0x87654321 - 2**32
    qzeros = torch.tensor([[5], [0xF]], dtype=torch.int32)
    scales = torch.zeros(2, 8, dtype=torch.float16)
    scales[:, 0] = 0.5

    weight = read_tensors(
        {"qweight": qweight, "qzeros": qzeros, "scales": scales}, meta_of(CheckpointFormat.AWQ_GEMV, group_size=128)
    )

    plain = unpack(weight)
    assert plain.codes[0, :9].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert plain.zeros.tolist() == [[5], [15]]


@pytest.mark.parametrize(
    ("word", "inputs", "output"),
    [
        # word 0: inputs 0 8 16 24 of the first of four outputs, word 1 the odd ones, word 2 the next pair
        (0, (0, 8, 16, 24), 0),
        (1, (1, 9, 17, 25), 0),
        (2, (2, 10, 18, 26), 0),
        (8, (32, 40, 48, 56), 0),
        (16, (0, 8, 16, 24), 1),
        (63, (39, 47, 55, 63), 3),
        (64, (64, 72, 80, 88), 0),
        (127, (103, 111, 119, 127), 3),
    ],
)
def test_a_gemv_fast_word_of_an_8_by_128_tile_lies_where_the_kernel_looks(
    word: int, inputs: tuple[int, ...], output: int
) -> None:
    # given a tile that is 0 but for one word of its second row of words: 1, 2, 3, 15 from the low end
    qweight = torch.zeros(2, 128, dtype=torch.int16)
    qweight[1, word] = 0xF321 - 2**16
    scales = torch.zeros(8, 8, dtype=torch.float16)
    scales[0] = 1

    weight = read_tensors(
        {"qweight": qweight, "qzeros": torch.zeros_like(scales), "scales": scales},
        meta_of(CheckpointFormat.AWQ_GEMV_FAST, group_size=128),
    )

    codes = unpack(weight).codes
    assert codes[4 + output, list(inputs)].tolist() == [1, 2, 3, 15]
    assert int(codes.sum()) == 21


def test_a_group_of_zeros_only_has_no_zero_point_to_recover() -> None:
    tensors = pack_gemv_fast(random_weight(8, 128, 128), 1)
    tensors["scales"][0, 3] = 0
    tensors["qzeros"][0, 3] = 0

    weight = read_tensors(tensors, meta_of(CheckpointFormat.AWQ_GEMV_FAST, group_size=128))

    assert int(weight.zeros[3, 0]) == 0


@pytest.mark.parametrize("product", [0.5, -16.0, -7.5])
def test_a_product_that_no_zero_point_gives_is_refused(product: float) -> None:
    tensors = pack_gemv_fast(random_weight(8, 128, 128), 1)
    tensors["scales"][0, 3] = 1
    tensors["qzeros"][0, 3] = product

    with pytest.raises(CheckpointError, match=r"layer\.qzeros is not -zero \* scale for zero points from 0 to 15"):
        read_tensors(tensors, meta_of(CheckpointFormat.AWQ_GEMV_FAST, group_size=128))


@pytest.mark.parametrize(
    ("stored_as", "suffix", "wrong", "message"),
    [
        (CheckpointFormat.AWQ_GEMV, "qweight", torch.zeros(8, 16).short(), r"qweight is int16 \[8, 16\]"),
        (
            CheckpointFormat.AWQ_GEMV,
            "qzeros",
            torch.zeros(8, 1).int(),
            r"qzeros is int32 \[8, 1\]; .*\[8, 2\]",
        ),
        (CheckpointFormat.AWQ_GEMV, "scales", torch.zeros(8, 8).half(), r"scales is float16 \[8, 8\]; .*\[8, 16\]"),
        (CheckpointFormat.AWQ_GEMV_FAST, "qweight", torch.zeros(2, 96).short(), "K a multiple of 64"),
        (
            CheckpointFormat.AWQ_GEMV_FAST,
            "qzeros",
            torch.zeros(8, 8).half(),
            r"qzeros .*\[8, 8\]; .*\[16, 8\]",
        ),
    ],
)
def test_a_wrong_tensor_is_named(stored_as: CheckpointFormat, suffix: str, wrong: Tensor, message: str) -> None:
    tensors = {**PACKERS[stored_as](random_weight(8, 128, 64), 2), suffix: wrong}

    with pytest.raises(CheckpointError, match=message):
        check_tensors(tensors, meta_of(stored_as, group_size=64))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="K=128, which group size 96 does not divide"):
        check_tensors(pack_gemv(random_weight(8, 128, 64), 2), meta_of(CheckpointFormat.AWQ_GEMV, group_size=96))
