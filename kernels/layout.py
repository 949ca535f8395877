"""The packed weight and every way its codes are laid out in memory: the only place that shifts bits.

Legend: N = out features, K = in features, G = groups along K (K / group_size).
"""

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from kernels.weight_kinds import SUPPORTED_BITS

# 3-bit codes lie in nibbles too, so that every 4-bit kernel reads them
NIBBLE_BITS = (3, 4)
BITS_PER_WORD = 32
AWQ_COLUMNS_PER_WORD = 8
# column held by nibble i (from the low end) of an AWQ gemm word: AutoAWQ awq/utils/packing_utils.py
AWQ_NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# rows of words in a block of the planar layout: what one step of the kernels multiplies
PLANAR_WORD_ROWS = 32
# columns that lie together; N is padded to them, so that a kernel never reads past a tile
PLANAR_TILE_COLUMNS = 128
# bits of a code -> inputs of a block, and group sizes that the kernels read; a multiple of one repeats its scales
PLANAR_BLOCKS = {3: 128, 4: 128, 8: 64}
PLANAR_GROUP_SIZES = {3: (32, 64, 128), 4: (32, 64, 128), 8: (32, 64)}

# torch's CPU op reads blocks of columns as wide as four vector registers; 64 is whole blocks on every instruction set
INT4_CPU_COLUMN_MULTIPLE = 64
# group sizes that torch's CPU op reads; a multiple of one of them repeats its scales
INT4_CPU_GROUP_SIZES = (32, 64, 128, 256)
# the tile of AutoAWQ's gemv_fast layout: rows whose codes alternate, and inputs of each in one run of words
GEMV_FAST_ROWS = 4
GEMV_FAST_INPUTS = 64
# neighbouring outputs whose codes are the low nibbles of neighbouring bytes, by torch's CPU capability; 1 for others
INT4_CPU_RUNS = {"AVX512": 32, "AVX2": 16}


class WeightLayout(Enum):
    """How `PackedWeight.codes` is arranged. Checkpoints are read into ROW_MAJOR; kernels read the others."""

    ROW_MAJOR = "row_major"
    """Codes of 3 or 4 bits: uint8 [N, ceil(K / 2)], byte b of a row holds k = 2b in its low nibble and k = 2b + 1 in
    its high one. Codes of 8 bits: uint8 [N, K]."""

    PLANAR = "planar"
    """What the Triton kernels read: int16 [N' / 128, B, 32, 128], where word (t, b, r, c) holds code k = 128b + 32j + r
    of output n = 128t + c in nibble j, or for codes of 8 bits k = 64b + 32j + r in byte j. scales [N' / 128,
    B * block / g, 128, 2] holds (scale, 1024 + zero), the second as fp16 bits whatever the dtype of the scales, which
    is that of a checkpoint with halves; zeros is the view of its second halves as fp16. N' is N padded to a multiple
    of 128, B * block is K padded to whole blocks of 128 or 64. What pads has code, zero point and scale 0: it adds
    exactly 0."""

    INT4_CPU = "int4_cpu"
    """What `torch.ops.aten._weight_int4pack_mm_for_cpu` reads: codes uint8 [N', K / 2], arranged by the running CPU's
    instruction set, so never stored. scales bf16 [G, N', 2] holds (scale, (8 - zero) * scale), as the op computes
    W = (code - 8) * scale + offset; zeros is the view of its offsets. N' is N padded to a multiple of 64 with zeros."""

    TILES = "tiles"
    """What the native CPU kernels read: tiles of 16 outputs, codes uint8 [tiles, K * 16 * bits / 8], in steps of 64
    bytes, 4 an output: of 8 bits the codes of 4 inputs, of 3 or 4 bits inputs 0 to 3 of 8 in the low nibbles and 4 to
    7 in the high ones. scales float16 or float32 [tiles, G, 16], zeros uint8 of that shape; padding outputs are 0."""


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's quantized weight: W[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g].

    codes: arranged as `layout` says. In ROW_MAJOR, scales is float [N, G] and zeros uint8 [N, G] (the true zero
    point, 0 .. 2**bits - 1); the run-time layouts document their own. One scale a row is group_size = K.
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
    return PackedWeight(
        codes=_pack_nibbles(plain.codes) if plain.bits in NIBBLE_BITS else plain.codes.contiguous(),
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
    num_columns = weight.shape[1]
    codes = _unpack_nibbles(weight.codes) if weight.bits in NIBBLE_BITS else weight.codes
    return GroupCodes(
        codes=codes[:, :num_columns].contiguous(),
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
    return replace(
        first,
        codes=torch.cat([weight.codes for weight in weights]),
        scales=torch.cat([weight.scales for weight in weights]),
        zeros=torch.cat([weight.zeros for weight in weights]),
        shape=(sum(weight.shape[0] for weight in weights), first.shape[1]),
    )


def repack_planar(weight: PackedWeight) -> PackedWeight:
    """ROW_MAJOR to PLANAR, the run-time layout of the Triton kernels (see `WeightLayout`); codes do not change.

    A group size that is a multiple of what the kernels read becomes the largest of those, its scales repeated. Scales
    of float32 are rounded to fp16, or to bf16 where fp16 has no normal number for one. Raises ValueError for another
    layout, or groups that are no multiple of 32.
    """
    group_size = _kernel_group_size(weight, PLANAR_GROUP_SIZES[weight.bits], "the planar layout")
    plain = _split_groups(unpack(weight), group_size)
    block = PLANAR_BLOCKS[weight.bits]
    num_rows, num_columns = weight.shape
    pad_rows, pad_columns = -num_rows % PLANAR_TILE_COLUMNS, -num_columns % block
    # whole groups: the group size divides both K and the block
    scales, zeros = (
        torch.nn.functional.pad(values, (0, pad_columns // group_size, 0, pad_rows))
        for values in (half_scales(plain.scales), plain.zeros)
    )
    pairs = torch.stack((scales, (zeros + 1024.0).to(torch.float16).view(scales.dtype)), dim=-1)
    # [N', G, 2] to [tiles, 128, G, 2] to [tiles, G, 128, 2]
    tiled_pairs = pairs.reshape(-1, PLANAR_TILE_COLUMNS, *pairs.shape[1:]).transpose(1, 2).contiguous()
    codes = torch.nn.functional.pad(plain.codes, (0, pad_columns, 0, pad_rows))
    # [N', blocks, plane j, r] to [tiles, blocks, r, 128, j]: the codes of a word side by side
    planes = codes.reshape(
        -1, PLANAR_TILE_COLUMNS, codes.shape[1] // block, block // PLANAR_WORD_ROWS, PLANAR_WORD_ROWS
    )
    word_codes = planes.permute(0, 2, 4, 1, 3)
    word_bytes = word_codes if weight.bits == 8 else word_codes[..., 0::2] | (word_codes[..., 1::2] << 4)
    return PackedWeight(
        codes=word_bytes.contiguous().view(torch.int16).squeeze(-1),
        scales=tiled_pairs,
        zeros=tiled_pairs.view(torch.float16)[..., 1],
        shape=weight.shape,
        bits=weight.bits,
        group_size=group_size,
        layout=WeightLayout.PLANAR,
    )


def unpack_planar(weight: PackedWeight) -> PackedWeight:
    """The inverse of `repack_planar`: PLANAR to ROW_MAJOR. Raises ValueError for another layout."""
    if weight.layout is not WeightLayout.PLANAR:
        raise ValueError(f"unpack_planar reads the planar layout, not {weight.layout.value}")
    num_rows, num_columns = weight.shape
    num_groups = num_columns // weight.group_size
    word_codes = weight.codes[..., None].view(torch.uint8)
    if weight.bits != 8:
        word_codes = torch.stack((word_codes & 0xF, word_codes >> 4), dim=-1).flatten(-2)
    # [tiles, blocks, r, 128, j] to [tiles, 128, blocks, j, r]
    codes = word_codes.permute(0, 3, 1, 4, 2).flatten(2).flatten(0, 1)
    scales, zeros = (
        values.transpose(1, 2).flatten(0, 1)[:num_rows, :num_groups] for values in (weight.scales[..., 0], weight.zeros)
    )
    return pack(
        GroupCodes(
            codes=codes[:num_rows, :num_columns].contiguous(),
            scales=scales,
            zeros=(zeros - 1024).to(torch.uint8),
            bits=weight.bits,
            group_size=weight.group_size,
        )
    )


def planar_on_device(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """A PLANAR weight moved to the device. Raises ValueError for another layout."""
    if weight.layout is not WeightLayout.PLANAR:
        raise ValueError(f"planar_on_device moves the planar layout, not {weight.layout.value}")
    scales = weight.scales.to(device)
    return replace(weight, codes=weight.codes.to(device), scales=scales, zeros=scales.view(torch.float16)[..., 1])


def half_scales(scales: Tensor) -> Tensor:
    """Scales in 16 bits: as they are, or rounded from float32 to the half type that holds their magnitudes."""
    if scales.dtype in (torch.float16, torch.bfloat16):
        return scales
    limits = torch.finfo(torch.float16)
    sizes = scales.abs()
    is_normal = (sizes == 0) | ((sizes >= limits.tiny) & (sizes <= limits.max))
    return scales.to(torch.float16 if bool(is_normal.all()) else torch.bfloat16)


def repack_int4_cpu(weight: PackedWeight) -> PackedWeight:
    """A ROW_MAJOR weight on the CPU as INT4_CPU. The codes are kept exactly; the scales are rounded to bf16.

    Raises ValueError for codes of 8 bits, or when the group size is no multiple of 32.
    """
    if weight.bits not in NIBBLE_BITS:
        raise ValueError(
            f"the CPU kernel holds codes of {NIBBLE_BITS} bits, not of {weight.bits}: dequantize the weight"
        )
    op_group_size = _kernel_group_size(weight, INT4_CPU_GROUP_SIZES, "the CPU kernel")
    plain = _split_groups(unpack(weight), op_group_size)
    num_rows = weight.shape[0]
    num_padding_rows = -num_rows % INT4_CPU_COLUMN_MULTIPLE
    codes = torch.nn.functional.pad(plain.codes.to(torch.int32), (0, 0, 0, num_padding_rows))
    scales = plain.scales.to(torch.bfloat16).float()
    # of the rounded scale, so that a code equal to its zero point stays nearest to 0
    offsets = (8 - plain.zeros.float()) * scales
    scales_and_offsets = torch.nn.functional.pad(
        torch.stack((scales, offsets), dim=-1), (0, 0, 0, 0, 0, num_padding_rows)
    )
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


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] codes as int32 words [R, ceil(C * bits / 32)]: dense, in natural order, from the low end.

    A row of words is one stream of bits: a code of 3 bits may lie in two words. GPTQ and compressed-tensors pack so.
    """
    num_rows, num_columns = codes.shape
    # 32 codes fill `bits` words
    padded = torch.nn.functional.pad(codes, (0, -num_columns % BITS_PER_WORD))
    if bits == 3:
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=codes.device)
        triples = (padded.reshape(num_rows, -1, 8).to(torch.int32) << shifts).sum(dim=-1, dtype=torch.int32)
        stream = triples[..., None].view(torch.uint8)[..., :3].reshape(num_rows, -1)
    else:
        stream = _pack_nibbles(padded) if bits == 4 else padded
    # the bytes of an int32 start at its low end on every machine that torch runs on
    words = stream.flatten().view(torch.int32).view(num_rows, -1)
    return words[:, : -(-num_columns * bits // BITS_PER_WORD)].contiguous()


def unpack_words(words: Tensor, bits: int, num_columns: int) -> Tensor:
    """The inverse of `pack_words`: int32 [R, ceil(C * bits / 32)] to uint8 [R, C] for C = num_columns."""
    num_rows = words.shape[0]
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    stream = padded.flatten().view(torch.uint8).view(num_rows, -1)
    if bits == 3:
        shifts = torch.arange(0, 24, 3, dtype=torch.int32, device=words.device)
        low, middle, high = stream.reshape(num_rows, -1, 3).to(torch.int32).unbind(dim=-1)
        triples = low | (middle << 8) | (high << 16)
        codes = ((triples[..., None] >> shifts) & 0b111).to(torch.uint8).reshape(num_rows, -1)
    else:
        codes = _unpack_nibbles(stream) if bits == 4 else stream
    return codes[:, :num_columns].contiguous()


def pack_awq_words(codes: Tensor) -> Tensor:
    """uint8 [R, N] of 4-bit codes to the int32 [R, N / 8] words of the AWQ gemm format.

    Raises ValueError when N is no multiple of 8 or a code is over 15.
    """
    num_rows, num_columns = codes.shape
    if num_columns % AWQ_COLUMNS_PER_WORD:
        raise ValueError(f"the AWQ gemm format packs 8 output columns a word; N={num_columns} is no multiple of 8")
    if codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"a 4-bit code is 0 to 15; found {int(codes.max())}")
    columns = codes.reshape(num_rows, -1, AWQ_COLUMNS_PER_WORD)[..., list(AWQ_NIBBLE_ORDER)]
    return pack_words(columns.reshape(num_rows, num_columns), bits=4)


def unpack_awq_words(words: Tensor) -> Tensor:
    """The inverse of `pack_awq_words`: int32 [R, N / 8] to uint8 [R, N]."""
    num_columns = words.shape[1] * AWQ_COLUMNS_PER_WORD
    nibbles = unpack_words(words, 4, num_columns).reshape(-1, words.shape[1], AWQ_COLUMNS_PER_WORD)
    columns = torch.empty_like(nibbles)
    columns[..., list(AWQ_NIBBLE_ORDER)] = nibbles
    return columns.reshape(words.shape[0], -1)


def unpack_gemv_fast_words(words: Tensor) -> Tensor:
    """The int16 [N / 4, K] words of AutoAWQ's gemv_fast layout (and llm-awq's) to uint8 codes [N, K].

    Four rows share a row of words: 16 words hold 64 inputs of the first, the next 16 those of the second, and so on.
    Source: llm-awq awq/quantize/qmodule.py, pack_intweight, interleave 4.
    """
    num_inputs = words.shape[1]
    # [row of words, run of 64 inputs, row, half of the run, a, nibble], where a nibble's t = AWQ_NIBBLE_ORDER[nibble]
    # holds input 8 * (t // 2) + 2 * a + t % 2 of its half
    nibbles = _unpack_nibbles(words.flatten().view(torch.uint8)).reshape(
        -1, num_inputs // GEMV_FAST_INPUTS, GEMV_FAST_ROWS, 2, 4, 8
    )
    ordered = torch.empty_like(nibbles)
    ordered[..., list(AWQ_NIBBLE_ORDER)] = nibbles
    tiles = ordered.view(*ordered.shape[:-1], 4, 2).permute(0, 2, 1, 3, 5, 4, 6)
    return tiles.reshape(-1, num_inputs)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [R, C] of codes under 16 to uint8 [R, ceil(C / 2)]: the even column in the low nibble."""
    padded = torch.nn.functional.pad(codes, (0, 1)) if codes.shape[1] % 2 else codes
    return padded[:, 0::2] | (padded[:, 1::2] << 4)


def _unpack_nibbles(data: Tensor) -> Tensor:
    """uint8 [R, B] to uint8 [R, 2B]: the low nibble first."""
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)


def _kernel_group_size(weight: PackedWeight, sizes: tuple[int, ...], reader: str) -> int:
    """The largest of `sizes` that divides the weight's groups; ValueError when `reader` cannot hold the weight."""
    fitting = [size for size in sizes if weight.group_size % size == 0]
    if not fitting:
        raise ValueError(f"{reader} reads group sizes that are multiples of {sizes[0]}, not {weight.group_size}")
    return fitting[-1]


def _split_groups(plain: GroupCodes, group_size: int) -> GroupCodes:
    """The same weight in smaller groups: scales and zeros repeated."""
    repeats = plain.group_size // group_size
    return GroupCodes(
        codes=plain.codes,
        scales=plain.scales.repeat_interleave(repeats, dim=1),
        zeros=plain.zeros.repeat_interleave(repeats, dim=1),
        bits=plain.bits,
        group_size=group_size,
    )


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
