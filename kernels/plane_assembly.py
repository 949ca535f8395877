"""PTX that turns packed codes into weights: two neighbouring int16 words of a lane to two registers of two weights.

Operands: $0, $1 the planes' weights (code - zero point, in WEIGHT_UNITS) as fp16 or bf16 pairs; $2 two words; $3 the
low plane's (scale, zero point) pair, which $4 repeats; $5 the high plane's, which $6 repeats. Or-ing a small integer
q into the bits of 1024 (fp16) or 128 (bf16) gives the number 1024 + q or 128 + q; fp16 also has room for 1024 + 16 q,
which saves shifts. In bf16 a nibble at bits 4 to 7 reaches into the exponent; but with nothing else in it, the number
is 16 q * 2**-133, because the subnormal numbers and the first normal ones are evenly spaced, and PTX keeps subnormal
operands of bf16. Every step is exact: the integers are below 2048 (fp16) or 256 (bf16).
"""

# or-ed to the nibbles of two words; 0xEA is the truth table of (a & b) | c
FP16_LOW = "lop3.b32 u, t, 0x000F000F, 0x64006400, 0xEA;"
FP16_HIGH = "lop3.b32 u, t, 0x00F000F0, 0x64006400, 0xEA;"
BF16_LOW = "lop3.b32 u, t, 0x000F000F, 0x43004300, 0xEA;"


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
    """A quarter of the weights: the largest power of two that a number of bf16 is multiplied with allows no more."""
    return [
        f"shr.u32 t, $2, {8 * pair};",
        # a zero point's byte under the exponent of -(32 + zero point / 4)
        "prmt.b32 z, $3, 0xC2C2C2C2, 0x4242;",
        BF16_LOW,
        "mov.b32 c, 0x3E803E80;",
        # (128 + q) / 4 - (32 + zero point / 4)
        "fma.rn.bf16x2 $0, u, c, z;",
        "prmt.b32 z, $5, 0xC2C2C2C2, 0x4242;",
        "mov.b32 u, 0x3F803F80;",
        "mov.b32 c, 0x42004200;",
        "fma.rn.bf16x2 z, z, u, c;",
        "and.b32 u, t, 0x00F000F0;",
        "mov.b32 c, 0x7F007F00;",
        # 16 q * 2**-133 * 2**127 - zero point / 4
        "fma.rn.bf16x2 $1, u, c, z;",
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
WEIGHT_UNITS = {("fp16", 4): 1.0, ("bf16", 4): 4.0, ("fp16", 8): 1.0, ("bf16", 8): 1.0}
