"""Two 8-bit codes of the cache in an int16 word, as jit functions: words to fp16 numbers, and numbers to codes.

`kv_codes` is the definition. CODES says what a word holds and how it is converted:
int8        uint8, offset by 128: the byte is or-ed into the bits of 1024, and 1152 is subtracted, both exact.
fp8         e4m3: its bits, moved into the fields of fp16, are the number times 2**-8, also where it is subnormal.
fp8_native  e4m3 by the conversion instruction of compute capability 8.9 and newer: the number itself.
"""

# mypy: disable-error-code="untyped-decorator"

from typing import Literal

import triton
import triton.language as tl

from kernels.kv_codes import SMALLEST_AMPLITUDE
from kernels.launch import operand

Codes = Literal["int8", "fp8", "fp8_native"]

# what the numbers of `split_words` are to be multiplied with
CODE_UNITS: dict[Codes | None, int] = {None: 1, "int8": 1, "fp8": 256, "fp8_native": 1}

# $2 holds two words, so bytes 0 and 2 are the low codes, 1 and 3 the high ones; 0xEA is the truth table of (a & b) | c
_DECLARE = "{ .reg .b32 a, b, c;"
INT8_ASSEMBLY = tl.constexpr(
    f"""{_DECLARE}
    prmt.b32 a, $2, 0x64646464, 0x4240;
    prmt.b32 b, $2, 0x64646464, 0x4341;
    mov.b32 c, 0x64806480;
    sub.rn.f16x2 $0, a, c;
    sub.rn.f16x2 $1, b, c; }}"""
)
FP8_ASSEMBLY = tl.constexpr(
    f"""{_DECLARE}
    shl.b32 a, $2, 8;
    and.b32 b, a, 0x80008000;
    shl.b32 a, $2, 7;
    lop3.b32 $0, a, 0x3F803F80, b, 0xEA;
    and.b32 b, $2, 0x80008000;
    shr.u32 a, $2, 1;
    lop3.b32 $1, a, 0x3F803F80, b, 0xEA; }}"""
)
FP8_NATIVE_ASSEMBLY = tl.constexpr(
    """{ .reg .b32 a; .reg .b16 low, high;
    prmt.b32 a, $2, $2, 0x3120;
    mov.b32 {low, high}, a;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high; }"""
)

_SMALLEST = tl.constexpr(SMALLEST_AMPLITUDE)


@triton.jit
def split_words(words: tl.tensor, CODES: tl.constexpr, INTERPRETED: tl.constexpr) -> tl.tuple:
    """The low and the high codes of int16 words as two tensors of fp16. Both paths give the same bits."""
    if INTERPRETED:
        bits = words.to(tl.int32)
        if CODES == "int8":
            low = _half_of(bits & 0xFF | 0x6400) - 1152.0
            high = _half_of((bits >> 8) & 0xFF | 0x6400) - 1152.0
        else:
            low = _half_of((bits << 7) & 0x3F80 | (bits << 8) & 0x8000)
            high = _half_of((bits >> 1) & 0x3F80 | bits & 0x8000)
    else:
        low, high = tl.inline_asm_elementwise(
            INT8_ASSEMBLY if CODES == "int8" else FP8_ASSEMBLY if CODES == "fp8" else FP8_NATIVE_ASSEMBLY,
            constraints="=r,=r,r",
            args=[words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return operand(low, INTERPRETED), operand(high, INTERPRETED)


@triton.jit
def encode_rows(numbers: tl.tensor, CODES: tl.constexpr) -> tl.tuple:
    """Codes uint8 [R, D] and scales float32 [R] of float32 [R, D], as `kv_codes.encode` defines them."""
    LARGEST: tl.constexpr = 127.0 if CODES == "int8" else 448.0
    sizes = tl.abs(numbers)
    # a maximum passes over NaN, so what is not finite is counted
    broken = tl.max(tl.where(sizes < float("inf"), 0, 1), 1) > 0
    amplitudes = tl.where(broken, 1.0, tl.maximum(tl.max(sizes, 1), _SMALLEST))
    largest = tl.full(amplitudes.shape, LARGEST, tl.float32)
    ratios = tl.where(broken[:, None], 0.0, numbers * tl.div_rn(largest, amplitudes)[:, None])
    scales = tl.where(broken, float("nan"), tl.div_rn(amplitudes, largest))
    codes = _int8_bits(ratios) if CODES == "int8" else _e4m3_bits(ratios)
    return codes.to(tl.uint8), scales


@triton.jit
def _int8_bits(ratios: tl.tensor) -> tl.tensor:
    """int32 codes of float32 within -127 .. 127: the sum's last place is 1, its low byte the rounded ratio + 128."""
    return (ratios + 12583040.0).to(tl.int32, bitcast=True) & 0xFF


@triton.jit
def _e4m3_bits(ratios: tl.tensor) -> tl.tensor:
    """int32 codes e4m3 of float32 within -448 .. 448, rounded to even. No instruction of older GPUs does it."""
    bits = ratios.to(tl.int32, bitcast=True)
    size_bits = bits & 0x7FFFFFFF
    # 20 bits of the mantissa go, and the exponent's bias falls from 127 to 7
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - 960
    # below 2**-6 a code's last place is 2**-9, which is the last place of numbers from 2**14 on
    subnormal = (tl.abs(ratios) + 16384.0).to(tl.int32, bitcast=True) & 0xF
    return tl.where(tl.abs(ratios) < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _half_of(bits: tl.tensor) -> tl.tensor:
    return bits.to(tl.int16).to(tl.float16, bitcast=True)
