"""What one compilation of a kernel is, and what a family of kernels tells `compile` of itself."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import triton.language as tl
from triton.runtime import JITFunction

DType = Literal["fp16", "bf16"]
DTYPES: tuple[DType, ...] = ("fp16", "bf16")

# what Triton takes when it is not told
PLAIN_STAGES = 3


@dataclass(frozen=True)
class LoopRules:
    """What the inner loop of a kernel with a dot must be like in machine code, and in what its length is counted.

    unit: what is counted per, as the reports print it. units: how many of them one iteration handles a lane, so that
    the cost is instructions of an iteration / units. wide_copies: whether its big operand must arrive by asynchronous
    copies of 128 bits. from_integers: whether instructions that convert integers to floating point are allowed.
    warp_products: whether the products may be those of one warp (HMMA) on every architecture, as the ones of a tile
    with few rows are. has_edges: whether a second, longer loop is for the few tiles at the ends, which are masked.
    max_idle: the most instructions of a program that has nothing to do, where many of a launch are such; None for any.
    """

    unit: str
    units: float
    wide_copies: bool = True
    from_integers: bool = False
    warp_products: bool = False
    has_edges: bool = False
    max_idle: int | None = None


@dataclass(frozen=True)
class Variant:
    """One compilation. arguments: each run-time argument's Triton type, with ":16" where it is a multiple of 16.

    constants: the other arguments. min_programs: how many programs a processor is planned to run at a time, which
    bounds the registers of a thread. max_registers: what the launch bounds them to, None for nothing. loop: None for a
    kernel without a dot.
    """

    kernel: str
    arch: int
    label: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | bool | str | tl.dtype | None], ...]
    num_warps: int
    num_stages: int
    loop: LoopRules | None
    min_programs: int = 1
    max_registers: int | None = None

    @property
    def name(self) -> str:
        """What reports and budgets call it; unique."""
        return f"sm{self.arch} {self.kernel} {self.label}"


@dataclass(frozen=True)
class Family:
    """Kernels that are changed together. name: of the file of their instruction budgets.

    all_variants: everything that the server may launch on an architecture. sample_variants: what the tests compile of
    it, every kernel and every tile once.
    """

    name: str
    kernels: dict[str, JITFunction]
    all_variants: Callable[[int], list[Variant]]
    sample_variants: Callable[[int], list[Variant]]


def plain_variant(
    kernel: str,
    arch: int,
    label: str,
    arguments: Mapping[str, str],
    constants: Mapping[str, int | bool | str | None],
    num_warps: int,
) -> Variant:
    """A kernel without a dot: nothing to pipeline, no loop with rules."""
    return Variant(
        kernel=kernel,
        arch=arch,
        label=label,
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=num_warps,
        num_stages=PLAIN_STAGES,
        loop=None,
    )
