"""The AWQ gemm codec against the byte description of the format."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.layout import GroupCodes, PackedWeight, pack, unpack
from quant.checkpoint.awq_gemm import encode
from quant.checkpoint.meta import CheckpointFormat
from quant.errors import CheckpointError, QuantizationError
from tests.quant.checkpoint.stored_modules import assert_same_weight, meta_of, random_weight, read_tensors

META = meta_of(CheckpointFormat.AWQ_GEMM)


def read_by_description(tensors: dict[str, torch.Tensor], group_size: int) -> npt.NDArray[np.float32]:
    """W [N, K] from the three tensors, by the words of the format alone: slow numpy loops, none of our code.

    Word column j of a row holds output columns 8j .. 8j + 7; nibble i, from the low end, holds column 8j + order[i].
    """
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight = tensors["qweight"].numpy().view(np.uint32)
    qzeros = tensors["qzeros"].numpy().view(np.uint32)
    scales = tensors["scales"].float().numpy()
    num_inputs, num_words = qweight.shape
    weight = np.zeros((num_words * 8, num_inputs), dtype=np.float32)
    for k in range(num_inputs):
        group = k // group_size
        for word in range(num_words):
            for nibble in range(8):
                n = 8 * word + order[nibble]
                code = int(qweight[k, word]) // 16**nibble % 16
                zero = int(qzeros[group, word]) // 16**nibble % 16
                weight[n, k] = (code - zero) * scales[group, n]
    return weight


def dequantize_by_definition(weight: PackedWeight) -> npt.NDArray[np.float32]:
    plain = unpack(weight)
    codes, zeros, scales = plain.codes.numpy(), plain.zeros.numpy(), plain.scales.float().numpy()
    result = np.zeros(codes.shape, dtype=np.float32)
    for k in range(codes.shape[1]):
        group = k // plain.group_size
        result[:, k] = (codes[:, k].astype(np.int32) - zeros[:, group]) * scales[:, group]
    return result


def test_a_tile_worked_by_hand_has_the_bytes_of_the_format() -> None:
    # given one input channel whose eight outputs have the codes 1, 2, ... 8 and the zero points 15, 0, 0 ...
    codes = torch.arange(1, 9, dtype=torch.uint8).reshape(8, 1)
    zeros = torch.tensor([15, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8).reshape(8, 1)
    weight = pack(GroupCodes(codes, torch.full((8, 1), 0.5), zeros, bits=4, group_size=1))

    # when it is encoded
    tensors = encode(weight)

    # then the nibbles, low end first, are columns 0 2 4 6 1 3 5 7: codes 1 3 5 7 2 4 6 8, so the word is 0x86427531
    assert tensors["qweight"].tolist() == [[0x86427531 - 2**32]]
    assert tensors["qzeros"].tolist() == [[15]]
    assert tensors["scales"].dtype == torch.float16
    assert tensors["scales"].tolist() == [[0.5] * 8]


@settings(max_examples=25, deadline=None)
@given(
    num_words=st.integers(1, 5),
    num_groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 3, 8, 32]),
    seed=st.integers(0, 1000),
)
def test_decode_is_the_inverse_of_encode(num_words: int, num_groups: int, group_size: int, seed: int) -> None:
    weight = random_weight(8 * num_words, num_groups * group_size, group_size, seed)

    assert_same_weight(read_tensors(encode(weight), META), weight)


@pytest.mark.parametrize(("num_outputs", "num_inputs", "group_size"), [(8, 576, 64), (40, 96, 32), (16, 128, 128)])
def test_a_reader_made_from_the_description_alone_sees_the_same_weight(
    num_outputs: int, num_inputs: int, group_size: int
) -> None:
    weight = random_weight(num_outputs, num_inputs, group_size)

    seen = read_by_description(encode(weight), group_size)

    np.testing.assert_array_equal(seen, dequantize_by_definition(weight))


def test_bfloat16_scales_are_read_as_they_are() -> None:
    tensors = encode(random_weight(8, 64, 32))
    stored = {**tensors, "scales": tensors["scales"].bfloat16()}

    decoded = read_tensors(stored, META)

    assert decoded.scales.dtype == torch.bfloat16
    assert torch.equal(decoded.scales, stored["scales"].T)


WRONG_TENSORS = {
    "qweight of another dtype": ("qweight", torch.zeros(64, 2).long(), r"layer\.qweight is int64 \[64, 2\]"),
    "qweight of one dimension": ("qweight", torch.zeros(64, dtype=torch.int32), r"layer\.qweight is int32 \[64\]"),
    "rows that the groups do not divide": (
        "qweight",
        torch.zeros(65, 2, dtype=torch.int32),
        "layer has 2 groups for 65 in features",
    ),
    "a group too few": ("qzeros", torch.zeros(1, 2, dtype=torch.int32), r"layer\.qzeros .* int32 \[2, 2\]"),
    "scales in float32": ("scales", torch.ones(2, 16), r"layer\.scales is float32"),
    "scales of another width": ("scales", torch.ones(2, 8).half(), r"layer\.scales .*\[2, 16\]"),
    "scales that are not finite": ("scales", torch.full((2, 16), float("nan")).half(), r"layer\.scales .* not finite"),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_a_wrong_tensor_is_named(case: str) -> None:
    suffix, wrong, message = WRONG_TENSORS[case]
    right = encode(random_weight(16, 64, 32))

    with pytest.raises(CheckpointError, match=message):
        read_tensors({**right, suffix: wrong}, META)


def test_a_group_size_that_the_config_says_otherwise_is_refused() -> None:
    tensors = encode(random_weight(16, 64, 32))

    with pytest.raises(CheckpointError, match="layer is stored in groups of 32, but quantization_config says 64"):
        read_tensors(tensors, meta_of(CheckpointFormat.AWQ_GEMM, group_size=64))


@pytest.mark.parametrize("scale", [1e-12, 1e6, float("inf"), 0.1])
def test_a_scale_that_float16_cannot_hold_is_not_written(scale: float) -> None:
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    zeros = torch.zeros(8, 1, dtype=torch.uint8)
    weight = pack(GroupCodes(codes, torch.full((8, 1), scale), zeros, bits=4, group_size=32))

    with pytest.raises(QuantizationError, match="do not fit float16 exactly"):
        encode(weight)


def test_outputs_that_do_not_fill_a_word_are_refused() -> None:
    with pytest.raises(ValueError, match="N=12 is no multiple of 8"):
        encode(random_weight(12, 32, 32))
