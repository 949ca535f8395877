"""Reads the machine code of a compiled kernel: what it asks of the GPU, its inner loop, and the faults in both.

The inner loop is the longest of the innermost loops that hold tensor-core instructions, or the shortest where a kernel
has another one for the tiles at the ends: from the label that a backward branch jumps to, up to that branch. What jumps
back from behind the kernel's end is the rare case of some instruction, and no loop. Its length is counted in
instructions of one lane, whatever they are (a NOP takes an issue slot too), and divided by the units of work that one
iteration does for the lane. For a linear layer a unit is a weight: a program of 32 * warps lanes handles tile columns x
128 weights an iteration, so

    instructions per weight = loop instructions * 32 * warps / (tile columns * 128)

A compiler that unrolls the loop n times shows n times the commits of asynchronous copies: their number in Triton's own
loop (`copies_per_iteration`) tells n, and the work of the loop is n iterations' then.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from kernels.tiles import ARCHITECTURES
from kernels.variant import Variant

# registers of a processor, and what the hardware hands them out in, for one warp
PROCESSOR_REGISTERS = 65_536
REGISTER_GRAIN = 8

LABEL = re.compile(r"^(\.L_\w+):")
# the predicate, if any, stands before the operation
OPERATION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
LOCAL_MEMORY = re.compile(r"(LDL|STL)\b")
FROM_INTEGERS = re.compile(r"I2FP?\b")
WIDE_ASYNC_COPY = re.compile(r"(LDGSTS\S*\.128|UBLKCP|UTMALDG)\b")
ASYNC_COMMIT = "LDGDEPBAR"
TENSOR_CORES = re.compile(r"(HMMA|HGMMA|UTC\w*MMA)\b")
# the tensor-core instructions that each architecture has its full speed with
WARP_PRODUCT = re.compile(r"HMMA\b")
FAMILIES = {
    80: WARP_PRODUCT,
    86: WARP_PRODUCT,
    89: WARP_PRODUCT,
    90: re.compile(r"HGMMA\b"),
    100: re.compile(r"UTC\w*MMA\b"),
    120: WARP_PRODUCT,
}


@dataclass(frozen=True)
class MachineCode:
    """What one variant became. shared_bytes, stack_bytes: of a program; registers: of a thread.

    copies_per_iteration: groups of asynchronous copies that one iteration of the pipelined loop commits.
    """

    variant: Variant
    shared_bytes: int
    registers: int
    stack_bytes: int
    copies_per_iteration: int
    assembly: str
    seconds: float

    @cached_property
    def loop(self) -> tuple[str, ...]:
        """The operations of the inner loop, in order; empty when no loop multiplies."""
        return inner_loop(self.assembly, has_edges=self.variant.loop is not None and self.variant.loop.has_edges)

    @property
    def cost(self) -> float | None:
        """Instructions per unit of work, to three places; None for a kernel without a loop to count."""
        if self.variant.loop is None or not self.loop:
            return None
        commits = self.loop.count(ASYNC_COMMIT)
        unrolled = max(1, commits // max(1, self.copies_per_iteration))
        return round(len(self.loop) / (unrolled * self.variant.loop.units), 3)


def inner_loop(assembly: str, *, has_edges: bool) -> tuple[str, ...]:
    """The operations of the inner loop in `nvdisasm -c` text. has_edges: as in `LoopRules`."""
    operations: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(operations)
        elif operation := OPERATION.search(line):
            operations.append(operation[1])
            branch = BRANCH.search(line)
            if branch and branch[1] in labels:
                loops.append((labels[branch[1]], len(operations)))
    loops = [loop for loop in loops if "EXIT" not in operations[slice(*loop)]]
    multiplying = [loop for loop in loops if any(TENSOR_CORES.match(name) for name in operations[slice(*loop)])]
    innermost = [
        (start, stop)
        for start, stop in multiplying
        if not any((start, stop) != (a, b) and start <= a and b <= stop for a, b in multiplying)
    ]
    if not innermost:
        return ()
    start, stop = sorted(innermost, key=lambda loop: loop[1] - loop[0])[0 if has_edges else -1]
    return tuple(operations[start:stop])


def find_faults(code: MachineCode) -> list[str]:
    """What would keep the variant from launching, or make it slow though it compiles. Empty when all is well."""
    faults = []
    limit = ARCHITECTURES[code.variant.arch].shared_bytes
    if code.shared_bytes > limit:
        faults.append(f"needs {code.shared_bytes} bytes of shared memory, the GPU has {limit}")
    if code.stack_bytes or any(LOCAL_MEMORY.match(name) for name in OPERATION.findall(code.assembly)):
        faults.append(f"spills registers to local memory ({code.stack_bytes} bytes of stack)")
    most = max_registers(code.variant)
    if code.registers > most:
        faults.append(f"needs {code.registers} registers; {code.variant.min_programs} programs leave {most} a thread")
    return faults + _loop_faults(code)


def max_registers(variant: Variant) -> int:
    """Registers a thread may have when `min_programs` programs are to share a processor."""
    lanes = 32 * variant.num_warps * variant.min_programs
    return min(255, PROCESSOR_REGISTERS // lanes // REGISTER_GRAIN * REGISTER_GRAIN)


def _loop_faults(code: MachineCode) -> list[str]:
    rules = code.variant.loop
    if rules is None:
        return []
    if not code.loop:
        return ["has no loop with tensor-core instructions"]
    faults = []
    family = FAMILIES[code.variant.arch]
    if not any(family.match(name) or (rules.warp_products and WARP_PRODUCT.match(name)) for name in code.loop):
        faults.append(f"multiplies by other instructions than {family.pattern} in its loop")
    if rules.wide_copies and not any(WIDE_ASYNC_COPY.match(name) for name in code.loop):
        faults.append("has no asynchronous copies of 128 bits in its loop")
    if not rules.from_integers and any(FROM_INTEGERS.match(name) for name in code.loop):
        faults.append("converts integers to floating point in its loop")
    # the first way out is that of a program without work
    idle = OPERATION.findall(code.assembly).index("EXIT") + 1 if rules.max_idle is not None else 0
    if rules.max_idle is not None and idle > rules.max_idle:
        faults.append(f"ends after {idle} instructions where there is nothing to do, not after {rules.max_idle}")
    return faults
