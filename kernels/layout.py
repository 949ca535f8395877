"""The packed weight and every way its codes are laid out in memory: the only place that shifts bits.

Legend: N = out features, K = in features, G = groups along K (K / group_size).
"""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

SUPPORTED_BITS = (4,)
AWQ_COLUMNS_PER_WORD = 8
# column held by nibble i (from the low end) of an AWQ gemm word: AutoAWQ awq/utils/packing_utils.py
AWQ_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

PLANAR_BLOCK = 128
PLANAR_WORD_ROWS = PLANAR_BLOCK // 4
# columns are padded to the widest tile of kernels/tiles.py, so that a kernel never reads past a row of words
PLANAR_COLUMN_MULTIPLE = 128
PLANAR_GROUP_SIZES = (32, 64, 128)

# torch's CPU op reads blocks of columns as wide as four vector registers; 64 is whole blocks on every instruction set
INT4_CPU_COLUMN_MULTIPLE = 64
# group sizes that torch's CPU op reads, widest first; a multiple of one of them repeats its scales
INT4_CPU_GROUP_SIZES = (256, 128, 64, 32)
# neighbouring outputs whose codes are the low nibbles of neighbouring bytes, by torch's CPU capability; 1 for others
INT4_CPU_RUNS = {"AVX512": 32, "AVX2": 16}


class WeightLayout(Enum):
    """How `PackedWeight.codes` is arranged. Checkpoints are read into ROW_MAJOR; kernels read the others."""

    ROW_MAJOR = "row_major"
    """uint8 [N, ceil(K / 2)]: byte b of a row holds k = 2b in its low nibble and k = 2b + 1 in its high one."""

    PLANAR = "planar"
    """What the Triton kernels read: int16 [ceil(K / 128) * 32, N'], where word (32b + r, n) holds k = 128b + 32j + r
    in nibble j; scales [ceil(K / 128) * 128 / g, N'] in the checkpoint's dtype, zeros int16 of that shape (bytes would
    be too narrow for asynchronous copies). N' is N padded to a multiple of 128. What pads has code, zero point and
    scale 0, so it adds exactly 0."""

    INT4_CPU = "int4_cpu"
    """What `torch.ops.aten._weight_int4pack_mm_for_cpu` reads: codes uint8 [N', K / 2], arranged by the running CPU's
    instruction set, so never stored. scales bf16 [G, N', 2] holds (scale, (8 - zero) * scale), as the op computes
    W = (code - 8) * scale + offset; zeros is the view of its offsets. N' is N padded to a multiple of 64 with zeros."""


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's quantized weight: W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g].

    codes: arranged as `layout` says. In ROW_MAJOR, scales is float [N, G] and zeros uint8 [N, G] (the true zero
    point, 0 .. 2**bits - 1); the run-time layouts document their own.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    shape: tuple[int, int]
    bits: int
    group_size: int
    layout: WeightLayout


@dataclass(frozen=True)
class GroupCodes:
    """The plain, unpacked form: codes uint8 [N, K], scales float [N, G], zeros uint8 [N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int


def pack(plain: GroupCodes) -> PackedWeight:
    """Pack plain codes into ROW_MAJOR. Raises ValueError when a shape, a dtype or a code is out of range."""
    _check_plain(plain)
    num_rows, num_columns = plain.codes.shape
    codes = plain.codes
    if num_columns % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return PackedWeight(
        codes=(codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous(),
        scales=plain.scales.contiguous(),
        zeros=plain.zeros.contiguous(),
        shape=(num_rows, num_columns),
        bits=plain.bits,
        group_size=plain.group_size,
        layout=WeightLayout.ROW_MAJOR,
    )


def unpack(weight: PackedWeight) -> GroupCodes:
    """The inverse of `pack`. Raises ValueError for a layout that is not ROW_MAJOR."""
    if weight.layout is not WeightLayout.ROW_MAJOR:
        raise ValueError(f"unpack reads the row_major layout, not {weight.layout.value}")
    num_rows, num_columns = weight.shape
    nibbles = torch.stack((weight.codes & 0xF, weight.codes >> 4), dim=-1).reshape(num_rows, -1)
    return GroupCodes(
        codes=nibbles[:, :num_columns].contiguous(),
        scales=weight.scales,
        zeros=weight.zeros,
        bits=weight.bits,
        group_size=weight.group_size,
    )


def concatenate_rows(weights: list[PackedWeight]) -> PackedWeight:
    """Join ROW_MAJOR weights that share their input along N (q, k, v; gate, up). Exact: no code changes.

    Raises ValueError when their K, bits or group size differ.
    """
    first = weights[0]
    for weight in weights:
        if weight.layout is not WeightLayout.ROW_MAJOR:
            raise ValueError(f"concatenate_rows joins the row_major layout, not {weight.layout.value}")
        if (weight.shape[1], weight.bits, weight.group_size) != (first.shape[1], first.bits, first.group_size):
            raise ValueError(
                "weights that share an input must agree: "
                f"K={first.shape[1]}, {first.bits} bits, group {first.group_size} against "
                f"K={weight.shape[1]}, {weight.bits} bits, group {weight.group_size}"
            )
    return PackedWeight(
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=torch.cat([weight.zeros for weight in weights]),
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
        bits=first.bits,
        group_size=first.group_size,
        layout=WeightLayout.ROW_MAJOR,
    )


def repack_planar(weight: PackedWeight) -> PackedWeight:
    """ROW_MAJOR to PLANAR, the run-time layout of the Triton kernels (see `WeightLayout`); codes do not change.

    Raises ValueError for another layout, or a group size that does not tile the 128 rows of a block.
    """
    if weight.group_size not in PLANAR_GROUP_SIZES:
        raise ValueError(f"the planar layout holds groups of {PLANAR_GROUP_SIZES}, not of {weight.group_size}")
    plain = unpack(weight)
    num_rows, num_columns = weight.shape
    pad_rows = -num_rows % PLANAR_COLUMN_MULTIPLE
    pad_columns = -num_columns % PLANAR_BLOCK
    # whole groups: the group size divides both K and the block
    pad_groups = pad_columns // weight.group_size
    scales, zeros = (
        torch.nn.functional.pad(values, (0, pad_groups, 0, pad_rows)) for values in (plain.scales, plain.zeros)
    )
    codes = torch.nn.functional.pad(plain.codes, (0, pad_columns, 0, pad_rows))
    # [N', blocks, plane j, r] to [blocks, r, N', j]: the four nibbles of a word side by side
    planes = codes.reshape(len(codes), -1, 4, PLANAR_WORD_ROWS).permute(1, 3, 0, 2)
    word_bytes = (planes[..., 0::2] | (planes[..., 1::2] << 4)).contiguous()
    return PackedWeight(
        codes=word_bytes.view(torch.int16).reshape(-1, len(codes)),
        scales=scales.t().contiguous(),
        zeros=zeros.t().contiguous().to(torch.int16),
        shape=weight.shape,
        bits=weight.bits,
        group_size=weight.group_size,
        layout=WeightLayout.PLANAR,
    )


def unpack_planar(weight: PackedWeight) -> PackedWeight:
    """The inverse of `repack_planar`: PLANAR to ROW_MAJOR. Raises ValueError for another layout."""
    if weight.layout is not WeightLayout.PLANAR:
        raise ValueError(f"unpack_planar reads the planar layout, not {weight.layout.value}")
    num_rows, num_columns = weight.shape
    num_groups = num_columns // weight.group_size
    num_padded_rows = weight.codes.shape[1]
    word_bytes = weight.codes.view(torch.uint8).reshape(-1, PLANAR_WORD_ROWS, num_padded_rows, 2)
    planes = torch.stack((word_bytes & 0xF, word_bytes >> 4), dim=-1).flatten(-2)
    codes = planes.permute(2, 0, 3, 1).reshape(num_padded_rows, -1)
    return pack(
        GroupCodes(
            codes=codes[:num_rows, :num_columns].contiguous(),
            scales=weight.scales.t()[:num_rows, :num_groups],
            zeros=weight.zeros.t()[:num_rows, :num_groups].to(torch.uint8),
            bits=weight.bits,
            group_size=weight.group_size,
        )
    )


def repack_int4_cpu(weight: PackedWeight) -> PackedWeight:
    """A ROW_MAJOR weight on the CPU as INT4_CPU. The codes are kept exactly; the scales are rounded to bf16.

    Raises ValueError when the group size is no multiple of 32.
    """
    plain = unpack(weight)
    num_rows = weight.shape[0]
    op_group_size = next((size for size in INT4_CPU_GROUP_SIZES if weight.group_size % size == 0), None)
    if op_group_size is None:
        raise ValueError(f"the CPU kernel reads group sizes that are multiples of 32, not {weight.group_size}")
    num_padding_rows = -num_rows % INT4_CPU_COLUMN_MULTIPLE
    codes = torch.nn.functional.pad(plain.codes.to(torch.int32), (0, 0, 0, num_padding_rows))
    scales = plain.scales.to(torch.bfloat16).float()
    # of the rounded scale, so that a code equal to its zero point stays nearest to 0
    offsets = (8 - plain.zeros.float()) * scales
    scales_and_offsets = torch.stack((scales, offsets), dim=-1).repeat_interleave(
        weight.group_size // op_group_size, dim=1
    )
    scales_and_offsets = torch.nn.functional.pad(scales_and_offsets, (0, 0, 0, 0, 0, num_padding_rows))
    packed_scales = scales_and_offsets.transpose(0, 1).contiguous().to(torch.bfloat16)
    repacked = PackedWeight(
        codes=torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        scales=packed_scales,
        zeros=packed_scales[..., 1],
        shape=weight.shape,
        bits=weight.bits,
        group_size=op_group_size,
        layout=WeightLayout.INT4_CPU,
    )
    if not torch.equal(unpack_int4_cpu(repacked)[:, :num_rows].T, plain.codes):
        raise RuntimeError("torch packs int4 codes on this CPU in an arrangement that unpack_int4_cpu does not know")
    return repacked


def unpack_int4_cpu(weight: PackedWeight) -> Tensor:
    """The codes of an INT4_CPU weight as uint8 [K, N'], padding included: a column per output.

    Source of the arrangement: torch, aten/src/ATen/native/cpu/int4mm_kernel.cpp, weight_to_int4pack_kernel.
    """
    run = INT4_CPU_RUNS.get(torch.backends.cpu.get_cpu_capability(), 1)
    num_columns = weight.shape[1]
    # [block, K, runs, run] bytes: the low nibbles of a run hold `run` neighbouring outputs, the high ones the next
    runs = weight.codes.view(-1, num_columns, max(1, 16 // run), run).permute(1, 0, 2, 3)
    return torch.stack((runs & 0xF, runs >> 4), dim=-2).reshape(num_columns, -1)


def pack_awq_words(codes: Tensor) -> Tensor:
    """uint8 [R, N] of 4-bit codes to the int32 [R, N / 8] words of the AWQ gemm format.

    Raises ValueError when N is no multiple of 8 or a code is over 15.
    """
    num_rows, num_columns = codes.shape
    if num_columns % AWQ_COLUMNS_PER_WORD:
        raise ValueError(f"the AWQ gemm format packs 8 output columns a word; N={num_columns} is no multiple of 8")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a 4-bit code is 0 to 15; found {int(codes.max())}")
    columns = codes.reshape(num_rows, -1, AWQ_COLUMNS_PER_WORD)[..., list(AWQ_NIBBLE_ORDER)].to(torch.int64)
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = (columns << shifts).sum(dim=-1)
    # two's complement by hand: a word with nibble 7 over 7 is negative as int32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpack_awq_words(words: Tensor) -> Tensor:
    """The inverse of `pack_awq_words`: int32 [R, N / 8] to uint8 [R, N]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    nibbles = (words[..., None] >> shifts) & 0xF
    columns = torch.empty_like(nibbles)
    columns[..., list(AWQ_NIBBLE_ORDER)] = nibbles
    return columns.reshape(words.shape[0], -1).to(torch.uint8)


def _check_plain(plain: GroupCodes) -> None:
    if plain.bits not in SUPPORTED_BITS:
        raise ValueError(f"{plain.bits}-bit codes are not supported; supported: {SUPPORTED_BITS}")
    if plain.codes.dtype != torch.uint8 or plain.zeros.dtype != torch.uint8:
        raise ValueError(f"codes and zeros must be uint8, not {plain.codes.dtype} and {plain.zeros.dtype}")
    num_rows, num_columns = plain.codes.shape
    if plain.group_size <= 0 or num_columns % plain.group_size:
        raise ValueError(f"group size {plain.group_size} does not divide K={num_columns}")
    group_shape = (num_rows, num_columns // plain.group_size)
    if plain.scales.shape != group_shape or plain.zeros.shape != group_shape:
        raise ValueError(
            f"scales and zeros must be {list(group_shape)}, "
            f"not {list(plain.scales.shape)} and {list(plain.zeros.shape)}"
        )
    largest = 2**plain.bits - 1
    for name, values in (("code", plain.codes), ("zero point", plain.zeros)):
        if values.numel() and int(values.max()) > largest:
            raise ValueError(f"a {plain.bits}-bit {name} is 0 to {largest}; found {int(values.max())}")
