"""PTX that turns packed codes into weights: two neighbouring int16 words of a lane to two registers of two weights.

Operands: $0, $1 the planes' weights (code - zero point, in WEIGHT_UNITS) as fp16 or bf16 pairs; $2 two words; $3 the
low plane's (scale, zero point) pair, which $4 repeats; $5 the high plane's, which $6 repeats. In fp16, or-ing a small
integer q into the bits of 1024 gives the number 1024 + q, and there is room for 1024 + 16 q, which saves shifts. bf16
has room for one nibble and not for the next. But with nothing else in a half, a nibble at bits 0 to 3 is the number
q * 2**-133 and one at bits 4 to 7 is 16 q * 2**-133, although the second reaches into the exponent: the subnormal
numbers and the first normal ones are evenly spaced, and PTX keeps subnormal operands of bf16. Every step is exact: the
integers are below 2048 (fp16) or 256 (bf16).
"""

# or-ed to the nibbles of two words; 0xEA is the truth table of (a & b) | c
FP16_LOW = "lop3.b32 u, t, 0x000F000F, 0x64006400, 0xEA;"
FP16_HIGH = "lop3.b32 u, t, 0x00F000F0, 0x64006400, 0xEA;"


def _zero_point(operand: str) -> list[str]:
    """The fp16 number 1024 + zero point, twice, in z: the high half of a (scale, zero point) pair."""
    return [f"mov.b32 {{l, h}}, {operand};", "mov.b32 z, {h, h};"]


def _fp16_nibbles(pair: int) -> list[str]:
    return [
        f"shr.u32 t, $2, {8 * pair};",
        *_zero_point("$3"),
        FP16_LOW,
        "sub.f16x2 $0, u, z;",
        *_zero_point("$5"),
        # 960 - (1024 + zero point) = -(64 + zero point)
        "mov.b32 c, 0x63806380;",
        "sub.f16x2 z, c, z;",
        FP16_HIGH,
        # (1024 + 16 q) / 16 - (64 + zero point)
        "mov.b32 c, 0x2C002C00;",
        "fma.rn.f16x2 $1, u, c, z;",
    ]


def _bf16_nibbles(pair: int) -> list[str]:
    """In 64ths: the largest power of two that a number of bf16 is multiplied with allows no more for the low nibble."""
    return [
        f"shr.u32 t, $2, {8 * pair};",
        # q * 2**-133 * 2**127, and 16 q * 2**-133 * 2**123
        *_bf16_nibble("0x000F000F", "0x7F007F00", "$3", "$0"),
        *_bf16_nibble("0x00F000F0", "0x7D007D00", "$5", "$1"),
    ]


def _bf16_nibble(mask: str, factor: str, operand: str, out: str) -> list[str]:
    return [
        # the bits of fp16's 1024 + zero point are bf16's 2**73 * (1 + zero point / 128)
        *_zero_point(operand),
        "mov.b32 u, 0x9B809B80;",
        "mov.b32 c, 0x40004000;",
        # times -2**-72, plus 2: -zero point / 64
        "fma.rn.bf16x2 z, z, u, c;",
        f"and.b32 u, t, {mask};",
        f"mov.b32 c, {factor};",
        f"fma.rn.bf16x2 {out}, u, c, z;",
    ]


def _byte_differences(plane: int, operand: str, out: str) -> list[str]:
    """Bytes `plane` of the two words under the exponent of 1024, less 1024 + zero point."""
    return [f"prmt.b32 u, $2, 0x64646464, 0x{4:x}{2 + plane:x}{4:x}{plane:x};", *_zero_point(operand),
            f"sub.f16x2 {out}, u, z;"]  # fmt: skip


def _bf16_bytes() -> list[str]:
    lines = []
    for plane, operand in enumerate(("$3", "$5")):
        lines += [
            *_byte_differences(plane, operand, "t"),
            "mov.b32 {l, h}, t;",
            "cvt.f32.f16 f, l;",
            "cvt.f32.f16 g, h;",
            f"cvt.rn.bf16x2.f32 ${plane}, g, f;",
        ]
    return lines


def _block(lines: list[str]) -> str:
    return "\n".join(["{ .reg .b32 t, u, z, c; .reg .b16 l, h; .reg .f32 f, g;", *lines, "}"])


# (dtype, bits, pair of planes) -> assembly
PLANE_ASSEMBLY = {
    ("fp16", 4, 0): _block(_fp16_nibbles(0)),
    ("fp16", 4, 1): _block(_fp16_nibbles(1)),
    ("bf16", 4, 0): _block(_bf16_nibbles(0)),
    ("bf16", 4, 1): _block(_bf16_nibbles(1)),
    ("fp16", 8, 0): _block([*_byte_differences(0, "$3", "$0"), *_byte_differences(1, "$5", "$1")]),
    ("bf16", 8, 0): _block(_bf16_bytes()),
}

# (dtype, bits) -> what the weights are multiplied with once their products are summed, to be code - zero point
WEIGHT_UNITS = {("fp16", 4): 1.0, ("bf16", 4): 64.0, ("fp16", 8): 1.0, ("bf16", 8): 1.0}
