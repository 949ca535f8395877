"""Words of two codes: both paths from bits to numbers on every word that there is, and numbers to codes."""

# mypy: disable-error-code="untyped-decorator"

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_codes import INT8_OFFSET
from kernels.kv_words import CODE_UNITS, FP8_ASSEMBLY, FP8_NATIVE_ASSEMBLY, INT8_ASSEMBLY, Codes, split_words
from tests.kernels.launches import DEVICE

EVERY_WORD = torch.arange(2**16)
ASSEMBLIES = {"int8": INT8_ASSEMBLY, "fp8": FP8_ASSEMBLY, "fp8_native": FP8_NATIVE_ASSEMBLY}
OPERAND = r"(\$\d|\w+)"


@triton.jit
def split_kernel(words_ptr: tl.tensor, low_ptr: tl.tensor, high_ptr: tl.tensor, CODES: tl.constexpr) -> None:
    index = tl.arange(0, 65536)
    low, high = split_words(tl.load(words_ptr + index), CODES, INTERPRETED=True)
    tl.store(low_ptr + index, low)
    tl.store(high_ptr + index, high)


def numbers_of(codes: Tensor, kind: Codes) -> Tensor:
    """What codes 0 to 255 stand for, in units of what the conversion gives."""
    if kind == "int8":
        return codes.float() - INT8_OFFSET
    return codes.to(torch.uint8).view(torch.float8_e4m3fn).float() / CODE_UNITS[kind]


def assert_same_numbers(found: Tensor, codes: Tensor, kind: Codes) -> None:
    expected = numbers_of(codes, kind)
    # the two codes of NaN are never written
    written = ~expected.isnan()
    assert torch.equal(found[written], expected[written])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_pure_path_gives_every_words_numbers(kind: Codes) -> None:
    low, high = (torch.empty(2**16, device=DEVICE) for _ in range(2))

    split_kernel[(1,)](EVERY_WORD.to(torch.int16).to(DEVICE), low, high, CODES=kind)

    assert_same_numbers(low.cpu(), EVERY_WORD & 0xFF, kind)
    assert_same_numbers(high.cpu(), EVERY_WORD >> 8, kind)


def permuted(first: Tensor, second: Tensor, selector: int) -> Tensor:
    """PTX prmt: each nibble of the selector, lowest first, names one of the eight bytes of second:first."""
    both = [(word >> shift) & 0xFF for word in (first, second) for shift in (0, 8, 16, 24)]
    return torch.stack([both[(selector >> 4 * place) & 0x7] << 8 * place for place in range(4)]).sum(0)


def halves(register: Tensor) -> Tensor:
    """The two fp16 numbers of 32-bit registers: float [..., 2]."""
    return torch.stack([register & 0xFFFF, register >> 16], -1).to(torch.int16).view(torch.float16).float()


def execute(assembly: str, words: Tensor) -> dict[str, Tensor]:
    """Run the text on registers of two words each; $0 and $1 of the result are pairs of numbers [..., 2]."""
    registers: dict[str, Tensor] = {"$2": words}

    def read(name: str) -> Tensor:
        return registers[name] if name in registers else torch.full_like(words, int(name, 0))

    for line in (part.strip() for part in re.split("[;{}]", assembly.replace("{low, high}", "pair"))):
        if not line or line.startswith(".reg"):
            continue
        operation, _, names = line.partition(" ")
        target, *operands = names.split(", ")
        if operation == "prmt.b32":
            registers[target] = permuted(read(operands[0]), read(operands[1]), int(operands[2], 0))
        elif operation == "mov.b32" and target == "pair":
            word = read(operands[0])
            registers |= {"low": word & 0xFFFF, "high": word >> 16}
        elif operation == "mov.b32":
            registers[target] = read(operands[0])
        elif operation == "shl.b32":
            registers[target] = (read(operands[0]) << int(operands[1])) & 0xFFFFFFFF
        elif operation == "shr.u32":
            registers[target] = read(operands[0]) >> int(operands[1])
        elif operation == "and.b32":
            registers[target] = read(operands[0]) & read(operands[1])
        elif operation == "lop3.b32":
            assert operands[3] == "0xEA"
            registers[target] = halves((read(operands[0]) & read(operands[1])) | read(operands[2]))
        elif operation == "sub.rn.f16x2":
            registers[target] = halves(read(operands[0])) - halves(read(operands[1]))
        else:
            assert operation == "cvt.rn.f16x2.e4m3x2", f"not understood: {line}"
            codes = torch.stack([read(operands[0]) & 0xFF, read(operands[0]) >> 8], -1)
            registers[target] = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return registers


@pytest.mark.parametrize("kind", ASSEMBLIES)
def test_the_assembly_gives_every_words_numbers(kind: Codes) -> None:
    assembly = str(getattr(ASSEMBLIES[kind], "value", ASSEMBLIES[kind]))
    others = EVERY_WORD.flip(0)

    registers = execute(assembly, EVERY_WORD | others << 16)

    for place, words in enumerate((EVERY_WORD, others)):
        assert_same_numbers(registers["$0"][:, place], words & 0xFF, kind)
        assert_same_numbers(registers["$1"][:, place], words >> 8, kind)
