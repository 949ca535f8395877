"""The inline assembly that no interpreter runs: its text, executed by hand on every word against every zero point."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.plane_assembly import PLANE_ASSEMBLY, WEIGHT_UNITS

EVERY_WORD = torch.arange(2**16)
HALVES = {"f16x2": torch.float16, "bf16x2": torch.bfloat16}
Registers = dict[str, Tensor]


def unpack_halves(register: Tensor, dtype: torch.dtype) -> Tensor:
    """The two numbers of 32-bit registers held in int64, as float64 [..., 2]."""
    halves = torch.stack((register & 0xFFFF, register >> 16), dim=-1)
    return halves.to(torch.int32).to(torch.int16).view(dtype).double()


def pack_halves(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, rounding each number once, as the hardware does."""
    halves = numbers.to(dtype).view(torch.int16).long() & 0xFFFF
    return halves[..., 0] | (halves[..., 1] << 16)


def permute_bytes(low: Tensor, high: Tensor, selector: Tensor) -> Tensor:
    """prmt: byte i of the result is the one that digit i of the selector names among the eight bytes of (high, low)."""
    result = torch.zeros_like(low)
    for index in range(4):
        choice = (int(selector) >> (4 * index)) & 0xF
        source = low if choice < 4 else high
        result = result | (((source >> (8 * (choice % 4))) & 0xFF) << (8 * index))
    return result


def run_line(line: str, registers: Registers) -> None:
    """One instruction of PTX, on every lane at once."""

    def read(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    if split := re.fullmatch(r"mov\.b32 \{(\w), (\w)\}, (\S+);", line):
        register = read(split[3])
        registers[split[1]], registers[split[2]] = register & 0xFFFF, register >> 16
    elif join := re.fullmatch(r"mov\.b32 (\S+), \{(\w), (\w)\};", line):
        registers[join[1]] = read(join[2]) | (read(join[3]) << 16)
    else:
        operation, operands = line.removesuffix(";").split(" ", 1)
        target, *names = operands.split(", ")
        registers[target] = OPERATIONS[operation](*[read(name) for name in names])


def add_halves(kind: str, sign: int) -> Callable[[Tensor, Tensor], Tensor]:
    dtype = HALVES[kind]
    return lambda a, b: pack_halves(unpack_halves(a, dtype) + sign * unpack_halves(b, dtype), dtype)


def fuse_halves(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    dtype = HALVES[kind]
    return lambda a, b, c: pack_halves(
        unpack_halves(a, dtype) * unpack_halves(b, dtype) + unpack_halves(c, dtype), dtype
    )


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    # 0xEA is the truth table of (a & b) | c
    "lop3.b32": lambda a, b, c, table: (a & b) | c if int(table) == 0xEA else torch.tensor(float("nan")),
    "prmt.b32": permute_bytes,
    "sub.f16x2": add_halves("f16x2", -1),
    "fma.rn.f16x2": fuse_halves("f16x2"),
    "fma.rn.bf16x2": fuse_halves("bf16x2"),
    # a float32 register is held as the number itself
    "cvt.f32.f16": lambda a: unpack_halves(a, torch.float16)[..., 0],
    "cvt.rn.bf16x2.f32": lambda high, low: pack_halves(torch.stack((low, high), dim=-1), torch.bfloat16),
}


def execute(assembly: str, words: Tensor, low_pair: Tensor, high_pair: Tensor) -> tuple[Tensor, Tensor]:
    """Run the text: two words a lane in int64, and each plane's (scale, zero point) pair. Registers $0 and $1."""
    first, *lines, last = assembly.splitlines()
    assert (first[:2], last) == ("{ ", "}")
    registers = {"$2": words, "$3": low_pair, "$5": high_pair}
    for line in lines:
        run_line(line, registers)
    return registers["$0"], registers["$1"]


@pytest.mark.parametrize("half", ["low", "high"])
@pytest.mark.parametrize(("dtype", "bits", "pair"), list(PLANE_ASSEMBLY))
def test_the_assembly_gives_code_less_zero_point_for_every_word(dtype: str, bits: int, pair: int, half: str) -> None:
    # the other half holds all ones: nothing of it may leak
    words = (EVERY_WORD | 0xFFFF0000) if half == "low" else (EVERY_WORD << 16 | 0xFFFF)
    zeros = range(16) if bits == 4 else (0, 1, 127, 128, 255)
    for low_zero in zeros:
        high_zero = 2**bits - 1 - low_zero
        # below each zero point stand the bits of a scale
        low_pair, high_pair = ((0x6400 + zero) << 16 | 0xABCD for zero in (low_zero, high_zero))

        planes = execute(PLANE_ASSEMBLY[dtype, bits, pair], words, torch.tensor(low_pair), torch.tensor(high_pair))

        for plane, (register, zero) in enumerate(zip(planes, (low_zero, high_zero), strict=True)):
            weights = unpack_halves(register, torch.float16 if dtype == "fp16" else torch.bfloat16)[
                :, int(half == "high")
            ]
            codes = (EVERY_WORD >> (bits * (2 * pair + plane))) & (2**bits - 1)
            assert torch.equal(weights * WEIGHT_UNITS[dtype, bits], (codes - zero).double())
