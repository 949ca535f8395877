"""The compressed-tensors codec against the compressed-tensors package itself, both ways, and by the format's words."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from kernels.layout import PackedWeight, unpack
from kernels.reference import dequantize
from quant.checkpoint.compressed_tensors import encode
from quant.checkpoint.meta import CheckpointFormat
from quant.errors import CheckpointError, QuantizationError
from tests.quant.checkpoint.stored_modules import (
    assert_same_weight,
    check_tensors,
    meta_of,
    random_weight,
    read_tensors,
)

META = meta_of(CheckpointFormat.COMPRESSED_TENSORS)
# (N, K, group size): N and K that fill no word, one scale a row, the demo model's K
SHAPES = [(8, 128, 128), (13, 96, 32), (33, 576, 64), (5, 100, 100), (40, 160, 32)]
DTYPES = (torch.float16, torch.bfloat16)


def scheme_of(weight: PackedWeight, *, symmetric: bool) -> QuantizationScheme:
    is_whole_row = weight.group_size == weight.shape[1]
    args = QuantizationArgs(
        num_bits=weight.bits,
        symmetric=symmetric,
        strategy="channel" if is_whole_row else "group",
        group_size=None if is_whole_row else weight.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


def multiply_out(weight: PackedWeight) -> Tensor:
    """(code - zero) * scale in the dtype of the scales, one group after another."""
    plain = unpack(weight)
    groups = plain.codes.unflatten(1, (-1, plain.group_size)).to(plain.scales.dtype)
    zeros, scales = plain.zeros[..., None].to(plain.scales.dtype), plain.scales[..., None]
    return ((groups - zeros) * scales).flatten(1)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_package_decompresses_what_is_written_to_the_same_numbers(
    shape: tuple[int, int, int], dtype: torch.dtype, bits: int
) -> None:
    weight = random_weight(*shape, bits=bits, scale_dtype=dtype)

    state = PackedQuantizationCompressor.decompress(encode(weight), scheme_of(weight, symmetric=False))

    assert state["weight"].dtype == dtype
    assert torch.equal(state["weight"], multiply_out(weight))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_package_compresses_is_read_exactly(
    shape: tuple[int, int, int], dtype: torch.dtype, bits: int, symmetric: bool
) -> None:
    weight = random_weight(*shape, bits=bits, scale_dtype=dtype)
    middle = 2 ** (bits - 1)
    if symmetric:
        weight.zeros.fill_(middle)
    state = {
        # in float32, so that the package rounds it back to the codes that it was made from
        "weight": dequantize(weight),
        "weight_scale": weight.scales,
        "weight_zero_point": (weight.zeros.int() - middle).to(torch.int8),
    }

    stored = PackedQuantizationCompressor.compress(state, scheme_of(weight, symmetric=symmetric))

    assert ("weight_zero_point" in stored) is not symmetric
    assert_same_weight(read_tensors(stored, META), weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_is_the_inverse_of_encode(shape: tuple[int, int, int], bits: int) -> None:
    weight = random_weight(*shape, bits=bits)

    assert_same_weight(read_tensors(encode(weight), META), weight)


def test_codes_are_stored_plus_half_their_range_low_bits_first_and_zero_points_along_the_outputs() -> None:
    # given ten outputs of eight inputs, of which the first has the signed codes -8, -7 ... -1
    tensors = {
        "weight_packed": torch.full((10, 1), 0x76543210, dtype=torch.int32),
        "weight_scale": torch.ones(10, 1, dtype=torch.bfloat16),
        # the eighth output's nibble makes the word negative, and two more begin another word
        "weight_zero_point": torch.tensor([[0xF0000001 - 2**32], [0x32]], dtype=torch.int32),
        "weight_shape": torch.tensor([10, 8]),
    }

    plain = unpack(read_tensors(tensors, meta_of(CheckpointFormat.COMPRESSED_TENSORS, bits=4)))

    assert plain.codes[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert plain.zeros[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 15, 2, 3]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_scales_keep_their_dtype(dtype: torch.dtype) -> None:
    weight = random_weight(8, 64, 32, scale_dtype=dtype)

    assert encode(weight)["weight_scale"].dtype == dtype
    assert_same_weight(read_tensors(encode(weight), META), weight)


@pytest.mark.parametrize(("bits", "middle"), [(3, 4), (4, 8), (8, 128)])
def test_a_zero_point_that_was_dropped_is_the_middle_of_the_codes(bits: int, middle: int) -> None:
    tensors = encode(random_weight(8, 64, 32, bits=bits))
    del tensors["weight_zero_point"]

    assert (read_tensors(tensors, META).zeros == middle).all()


def test_a_zero_point_that_the_config_promises_must_be_there() -> None:
    tensors = encode(random_weight(8, 64, 32))
    del tensors["weight_zero_point"]

    with pytest.raises(CheckpointError, match=r"layer\.weight_zero_point is missing"):
        check_tensors(tensors, meta_of(CheckpointFormat.COMPRESSED_TENSORS, symmetric=False))


def test_a_group_index_in_order_says_nothing_and_one_out_of_order_is_refused() -> None:
    weight = random_weight(8, 64, 32)
    ordered = torch.arange(64, dtype=torch.int32) // 32
    assert_same_weight(read_tensors({**encode(weight), "weight_g_idx": ordered}, META), weight)

    with pytest.raises(CheckpointError, match=r"layer\.weight_g_idx puts inputs into groups out of order"):
        check_tensors({**encode(weight), "weight_g_idx": ordered.flip(0)}, META)


@pytest.mark.parametrize(
    ("suffix", "wrong", "message"),
    [
        ("weight_packed", torch.zeros(8, 8).long(), r"layer\.weight_packed is int64 \[8, 8\]"),
        ("weight_packed", torch.zeros(8, 4).int(), "holds 64 codes in 4 words, 2 bits a code; 3, 4, 8 bits are read"),
        ("weight_shape", torch.tensor([9, 64]), r"layer\.weight_shape is \[9, 64\], but weight_packed has 8 rows"),
        ("weight_shape", torch.tensor([8, -64]), r"layer\.weight_shape is \[8, -64\]"),
        ("weight_scale", torch.ones(8, 3).half(), r"layer\.weight_zero_point is int32 \[1, 2\]; .*\[1, 3\]"),
        ("weight_scale", torch.ones(7, 2).half(), r"layer\.weight_scale is float16 \[7, 2\]; .*\[8, 2\]"),
        ("weight_zero_point", torch.zeros(8, 2).char(), r"layer\.weight_zero_point is int8 \[8, 2\]; .*int32 \[1, 2\]"),
    ],
)
def test_a_wrong_tensor_is_named(suffix: str, wrong: Tensor, message: str) -> None:
    tensors = {**encode(random_weight(8, 64, 32)), suffix: wrong}

    with pytest.raises(CheckpointError, match=message):
        check_tensors(tensors, META)


def test_a_scale_that_is_not_finite_is_neither_written_nor_read() -> None:
    weight = random_weight(8, 64, 32)
    tensors = encode(weight)
    weight.scales[0, 0] = float("inf")

    with pytest.raises(QuantizationError, match="a scale is not finite"):
        encode(weight)
    with pytest.raises(CheckpointError, match=r"layer\.weight_scale holds values that are not finite"):
        read_tensors({**tensors, "weight_scale": weight.scales}, META)
