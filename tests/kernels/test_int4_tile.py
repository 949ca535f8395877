"""The inline assembly that no interpreter runs: its text, executed by hand on every word that there is."""

import re

import pytest
import torch

from kernels.int4_tile import BF16_ASSEMBLY, FP16_ASSEMBLY

OPERAND = r"(\$\d|shifted|0x[0-9A-F]+|\d+)"


def execute(assembly: str, words: torch.Tensor) -> list[torch.Tensor]:
    """Run the shifts and three-way logic of the text on 32-bit words (held in int64): the registers $0 to $3."""
    registers = {"$4": words}

    def read(name: str) -> torch.Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in assembly.splitlines():
        if shift := re.fullmatch(rf"shr\.u32 {OPERAND}, {OPERAND}, {OPERAND};", line):
            registers[shift[1]] = read(shift[2]) >> read(shift[3])
        elif logic := re.fullmatch(rf"lop3\.b32 {OPERAND}, {OPERAND}, {OPERAND}, {OPERAND}, 0xEA;", line):
            registers[logic[1]] = (read(logic[2]) & read(logic[3])) | read(logic[4])
        else:
            assert line in ("{ .reg .b32 shifted;", "}"), f"not understood: {line}"
    return [registers[f"${plane}"] for plane in range(4)]


@pytest.mark.parametrize(
    ("assembly", "dtype", "bias"), [(FP16_ASSEMBLY, torch.float16, 1024), (BF16_ASSEMBLY, torch.bfloat16, 128)]
)
@pytest.mark.parametrize("half", ["low", "high"])
def test_the_assembly_gives_biased_nibbles_for_every_word(
    assembly: str, dtype: torch.dtype, bias: int, half: str
) -> None:
    every_word = torch.arange(2**16)
    # the other half holds all ones: nothing of it may leak
    pairs = (every_word | 0xFFFF0000) if half == "low" else (every_word << 16 | 0xFFFF)

    planes = execute(str(getattr(assembly, "value", assembly)), pairs)

    for plane, register in enumerate(planes):
        bits = (register if half == "low" else register >> 16) & 0xFFFF
        numbers = bits.to(torch.int16).view(dtype).float()
        assert torch.equal(numbers, bias + ((every_word >> (4 * plane)) & 0xF).float())
