"""The K loop that both INT4 kernels share, as jit functions: planar words to fp16 or bf16 weights, products to sums.

Legend: N = out features, K = in features, M = rows of activations. Weights are operand A: the tile is [N, M].
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from kernels.launch import operand
from kernels.layout import PLANAR_BLOCK, PLANAR_WORD_ROWS

BLOCK = tl.constexpr(PLANAR_BLOCK)
WORD_ROWS = tl.constexpr(PLANAR_WORD_ROWS)
# or-ing a small integer q into these bits gives the floating-point number 1024 + q (fp16) or 128 + q (bf16)
FP16_BIAS_BITS = tl.constexpr(0x6400)
BF16_BIAS_BITS = tl.constexpr(0x4300)


def _planes_assembly(bias_bits: int) -> str:
    """PTX for two neighbouring int16 words at once: four registers, each with two biased numbers."""
    lines = ["{ .reg .b32 shifted;"]
    for plane in range(4):
        # 0xEA is the truth table of (a & b) | c
        lines += [
            f"shr.u32 shifted, $4, {4 * plane};",
            f"lop3.b32 ${plane}, shifted, 0x000F000F, 0x{bias_bits:04X}{bias_bits:04X}, 0xEA;",
        ]
    return "\n".join([*lines, "}"])


FP16_ASSEMBLY = tl.constexpr(_planes_assembly(0x6400))
BF16_ASSEMBLY = tl.constexpr(_planes_assembly(0x4300))


@triton.jit
def plane_bits(words: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tuple:
    """The four nibbles of int16 words as the bits of four biased numbers. Both paths give the same bits."""
    if INTERPRETED:
        bits = (
            biased_bits(words & 0xF, dtype),
            biased_bits((words >> 4) & 0xF, dtype),
            biased_bits((words >> 8) & 0xF, dtype),
            biased_bits((words >> 12) & 0xF, dtype),
        )
    else:
        bits = tl.inline_asm_elementwise(
            FP16_ASSEMBLY if dtype == tl.float16 else BF16_ASSEMBLY,
            constraints="=r,=r,=r,=r,r",
            args=[words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
    return bits


@triton.jit
def biased_bits(integers: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """int16 0..15 to the bits of 1024 + q in fp16, or of 128 + q in bf16, without a conversion instruction."""
    return integers | (FP16_BIAS_BITS if dtype == tl.float16 else BF16_BIAS_BITS)


@triton.jit
def numbers(bits: tl.tensor, dtype: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tensor:
    """int16 bits read as fp16 or bf16."""
    return operand(bits.to(dtype, bitcast=True), INTERPRETED)


@triton.jit
def multiply_blocks(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    zeros_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    first_block: tl.tensor,
    last_block: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """The sum over K blocks first_block .. last_block: float32 [TILE_COLUMNS, TILE_ROWS].

    x [M, K] with rows x_stride apart; words, scales and zeros as `WeightLayout.PLANAR` says, rows weight_stride apart.
    """
    PLANES_PER_GROUP: tl.constexpr = GROUP_SIZE // WORD_ROWS
    GROUPS_PER_BLOCK: tl.constexpr = BLOCK // GROUP_SIZE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    word_rows = tl.arange(0, WORD_ROWS)
    # 64-bit from here on: an activation or a weight may hold more than 2**31 elements
    x_rows_ptr = x_ptr + rows.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
    for block in range(first_block, last_block):
        word_offsets = (word_rows.to(tl.int64) + block * WORD_ROWS)[None, :] * weight_stride + columns[:, None]
        planes = plane_bits(tl.load(words_ptr + word_offsets), dtype, INTERPRETED)
        for group in tl.static_range(GROUPS_PER_BLOCK):
            product = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
            group_row = block * GROUPS_PER_BLOCK + group
            group_offsets = columns + tl.cast(group_row, tl.int64) * weight_stride
            zeros = numbers(biased_bits(tl.load(zeros_ptr + group_offsets), dtype), dtype, INTERPRETED)
            for plane in tl.static_range(group * PLANES_PER_GROUP, (group + 1) * PLANES_PER_GROUP):
                # exact: both are integers that the type holds
                weights = numbers(planes[plane], dtype, INTERPRETED) - zeros[:, None]
                inputs = word_rows + (block * BLOCK + plane * WORD_ROWS)
                inside = (inputs < num_inputs)[:, None] & (rows < num_rows)[None, :]
                x = tl.load(x_rows_ptr + inputs[:, None], mask=inside, other=0.0)
                product = tl.dot(weights, operand(x, INTERPRETED), product)
            scales = tl.load(scales_ptr + group_offsets).to(tl.float32)
            # an explicit fma, so that the bits do not hang on what the compiler contracts
            total = tl.fma(product, tl.broadcast_to(scales[:, None], total.shape), total)
    return total


@triton.jit
def store_tile(
    out_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    total: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
) -> None:
    """Write the float32 tile [columns, rows], plus the bias [N] if there is one, to out [M, N] in its dtype."""
    if bias_ptr is not None:
        total += tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0).to(tl.float32)[:, None]
    offsets = rows.to(tl.int64)[None, :] * num_columns + columns[:, None]
    inside = (rows < num_rows)[None, :] & (columns < num_columns)[:, None]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)
