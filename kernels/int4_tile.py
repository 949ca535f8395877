"""The K loop that the linear kernels share, as jit functions: planar words to fp16 or bf16 weights, products to sums.

Legend: N = out features, K = in features, M = rows of activations. Weights are operand A: the tile is [N, M].
`docs/kernels.md` explains the layout, the conversion and why the loop is as short as it is.
"""

# mypy: disable-error-code="untyped-decorator"

import triton
import triton.language as tl

from kernels.launch import operand
from kernels.layout import PLANAR_TILE_COLUMNS, PLANAR_WORD_ROWS
from kernels.plane_assembly import PLANE_ASSEMBLY, WEIGHT_UNITS

WORD_ROWS = tl.constexpr(PLANAR_WORD_ROWS)
TILE_COLUMNS_STORED = tl.constexpr(PLANAR_TILE_COLUMNS)
FP16_PAIR_0 = tl.constexpr(PLANE_ASSEMBLY["fp16", 4, 0])
FP16_PAIR_1 = tl.constexpr(PLANE_ASSEMBLY["fp16", 4, 1])
BF16_PAIR_0 = tl.constexpr(PLANE_ASSEMBLY["bf16", 4, 0])
BF16_PAIR_1 = tl.constexpr(PLANE_ASSEMBLY["bf16", 4, 1])
FP16_BYTES = tl.constexpr(PLANE_ASSEMBLY["fp16", 8, 0])
BF16_UNIT = tl.constexpr(WEIGHT_UNITS["bf16", 4])
BF16_BYTES = tl.constexpr(PLANE_ASSEMBLY["bf16", 8, 0])


@triton.jit
def weight_unit(BITS: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """What `plane_pair` counts weights in: a power of two, so that multiplying a sum by it rounds nothing."""
    UNIT: tl.constexpr = BF16_UNIT if BITS == 4 and dtype == tl.bfloat16 else 1.0
    return tl.full((), UNIT, tl.float32)


@triton.jit
def plane_pair(
    words: tl.tensor,
    low_pairs: tl.tensor,
    high_pairs: tl.tensor,
    PAIR: tl.constexpr,
    BITS: tl.constexpr,
    dtype: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tuple:
    """Planes 2 * PAIR and 2 * PAIR + 1 of int16 words [N, R], less their zero points: exact, in dtype, of weight_unit.

    low_pairs, high_pairs: int32 [N], the (scale, zero point) of each plane's group.
    """
    if INTERPRETED:
        low = plane_numbers(words, low_pairs, 2 * PAIR, BITS, dtype)
        high = plane_numbers(words, high_pairs, 2 * PAIR + 1, BITS, dtype)
    else:
        FP16_NIBBLES: tl.constexpr = FP16_PAIR_0 if PAIR == 0 else FP16_PAIR_1
        BF16_NIBBLES: tl.constexpr = BF16_PAIR_0 if PAIR == 0 else BF16_PAIR_1
        FP16_ASSEMBLY: tl.constexpr = FP16_BYTES if BITS == 8 else FP16_NIBBLES
        BF16_ASSEMBLY: tl.constexpr = BF16_BYTES if BITS == 8 else BF16_NIBBLES
        # pack=2: two neighbouring words of a lane at a time, so each pair comes twice, as $3 and $4, as $5 and $6
        low_bits, high_bits = tl.inline_asm_elementwise(
            FP16_ASSEMBLY if dtype == tl.float16 else BF16_ASSEMBLY,
            constraints="=&r,=&r,r,r,r,r,r",
            args=[
                words,
                tl.broadcast_to(low_pairs[:, None], words.shape),
                tl.broadcast_to(high_pairs[:, None], words.shape),
            ],
            dtype=(tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
        low = low_bits.to(dtype, bitcast=True)
        high = high_bits.to(dtype, bitcast=True)
    return low, high


@triton.jit
def plane_numbers(
    words: tl.tensor, pairs: tl.tensor, PLANE: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """The same of one plane without assembly, for the interpreter: float32, which holds what dtype would."""
    codes = (words >> (BITS * PLANE)) & (2**BITS - 1)
    # ten bits of mantissa under the 1024 that is added to a zero point
    zeros = (pairs >> 16) & 0x3FF
    numbers = (codes.to(tl.int32) - zeros[:, None]).to(tl.float32) / weight_unit(BITS, dtype)
    return operand(numbers.to(dtype), INTERPRETED=True)


@triton.jit
def pair_scales(pairs: tl.tensor, SCALES_ARE_BF16: tl.constexpr) -> tl.tensor:
    """The scales of int32 (scale, zero point) pairs as float32: their low halves."""
    if SCALES_ARE_BF16:
        scales = (pairs << 16).to(tl.float32, bitcast=True)
    else:
        scales = pairs.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return scales


@triton.jit
def add_scaled(total: tl.tensor, product: tl.tensor, pairs: tl.tensor, SCALES_ARE_BF16: tl.constexpr) -> tl.tensor:
    """total + product * scale, float32 [N, M], a scale for each row of N."""
    scales = pair_scales(pairs, SCALES_ARE_BF16)
    # an explicit fma, so that the bits do not hang on what the compiler contracts
    return tl.fma(product, tl.broadcast_to(scales[:, None], total.shape), total)


@triton.jit
def multiply_blocks(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    row_offsets: tl.tensor,
    first_column: tl.tensor,
    first_block: tl.tensor,
    last_block: tl.tensor,
    num_blocks: tl.tensor,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALES_ARE_BF16: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """The sum over K blocks first_block .. last_block of num_blocks: float32 [TILE_COLUMNS, TILE_ROWS].

    x: whole blocks of K, row m at row_offsets[m]. words and pairs: all of a PLANAR weight. Nothing is masked: the
    layout pads N and K, and rows past M repeat one that is there.
    """
    PLANES: tl.constexpr = 16 // BITS
    BLOCK: tl.constexpr = PLANES * WORD_ROWS
    PAIRS_PER_BLOCK: tl.constexpr = BLOCK // GROUP_SIZE * TILE_COLUMNS_STORED
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, TILE_COLUMNS)
    word_rows = tl.arange(0, WORD_ROWS)
    word_offsets = word_rows[None, :] * TILE_COLUMNS_STORED + columns[:, None]
    x_offsets = word_rows[:, None] + row_offsets[None, :]
    # 64-bit bases that step along, 32-bit offsets that stay: an address costs no multiplication in the loop
    block_index = (first_column // TILE_COLUMNS_STORED).to(tl.int64) * num_blocks + first_block
    # Triton 3.6 knows what a product is a multiple of, which wide copies need, and of a remainder it doesn't
    column_in_tile = first_column // TILE_COLUMNS % (TILE_COLUMNS_STORED // TILE_COLUMNS) * TILE_COLUMNS
    words_ptr += block_index * (WORD_ROWS * TILE_COLUMNS_STORED) + column_in_tile
    pairs_ptr += block_index * PAIRS_PER_BLOCK + column_in_tile
    x_ptr += first_block * BLOCK
    total = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
    for _ in range(first_block, last_block):
        words = tl.load(words_ptr + word_offsets)
        for pair in tl.static_range(PLANES // 2):
            if 2 * pair * WORD_ROWS % GROUP_SIZE == 0:
                low_pairs = tl.load(pairs_ptr + 2 * pair * WORD_ROWS // GROUP_SIZE * TILE_COLUMNS_STORED + columns)
                high_pairs = low_pairs
                product = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
            if GROUP_SIZE == WORD_ROWS:
                high_pairs = tl.load(pairs_ptr + (2 * pair + 1) * TILE_COLUMNS_STORED + columns)
            low, high = plane_pair(words, low_pairs, high_pairs, pair, BITS, dtype, INTERPRETED)
            x = tl.load(x_ptr + 2 * pair * WORD_ROWS + x_offsets)
            product = tl.dot(low, operand(x, INTERPRETED), product)
            if GROUP_SIZE == WORD_ROWS:
                total = add_scaled(total, product, low_pairs, SCALES_ARE_BF16)
                product = tl.zeros((TILE_COLUMNS, TILE_ROWS), tl.float32)
            x = tl.load(x_ptr + (2 * pair + 1) * WORD_ROWS + x_offsets)
            product = tl.dot(high, operand(x, INTERPRETED), product)
            if (2 * pair + 2) * WORD_ROWS % GROUP_SIZE == 0:
                total = add_scaled(total, product, high_pairs, SCALES_ARE_BF16)
        words_ptr += WORD_ROWS * TILE_COLUMNS_STORED
        pairs_ptr += PAIRS_PER_BLOCK
        x_ptr += BLOCK
    return total * weight_unit(BITS, dtype)


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
