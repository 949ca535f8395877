"""Compiles every kernel variant for GPUs that need not be here, and checks the machine code: the gate without a GPU.

`python -m kernels.compile [--arch 90 ...] [--family linear ...] [--sample]` prints a line per variant; exit code 1 if
one of them fails. `--lower-budgets` keeps the instruction counts of kernels that became shorter.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from kernels import instruction_budget
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED
from kernels.machine_code import MachineCode, find_faults
from kernels.tiles import ARCHITECTURES
from kernels.variant import Variant
from kernels.variants import FAMILIES, KERNELS, family_of

DISASSEMBLERS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Triton's name for the end of a group of asynchronous copies
COMMIT = "ttg.async_commit_group"


def compile_variant(variant: Variant) -> MachineCode:
    """Compile for the variant's architecture and disassemble. Triton's own exception tells why one cannot be."""
    return compile_kernel(KERNELS[variant.kernel], variant)


def compile_kernel(kernel: JITFunction, variant: Variant) -> MachineCode:
    """The same for a kernel that is in no family."""
    started = time.monotonic()
    arguments, constants = dict(variant.arguments), dict(variant.constants)
    signature = {name: arguments.get(name, "constexpr").removesuffix(":16") for name in kernel.arg_names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if arguments.get(name, "").endswith(":16")
    }
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", variant.arch, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": FUSE_FLOATS,
            "maxnreg": variant.max_registers,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = _disassemble("cuobjdump", binary.name, "-res-usage")
        # the disassembler takes a third of the gate's time, and without a loop there is nothing in it to read: what
        # spills has a stack. Nobody reads its analysis of branches either, which changes nothing in the text
        assembly = "" if variant.loop is None else _disassemble("nvdisasm", binary.name, "-c", "-ndf")
    registers, stack_bytes, local_bytes = (
        int(re.findall(rf"\b{field}:(\d+)", usage)[0]) for field in ("REG", "STACK", "LOCAL")
    )
    return MachineCode(
        variant=variant,
        shared_bytes=int(compiled.metadata.shared),
        registers=registers,
        stack_bytes=stack_bytes + local_bytes,
        copies_per_iteration=_copies_in_loop(str(compiled.asm["ttgir"])),
        assembly=assembly,
        seconds=time.monotonic() - started,
    )


def _copies_in_loop(intermediate: str) -> int:
    """Groups of asynchronous copies that are committed inside loops: those that stand deeper than a loop's head."""
    commits = 0
    loop_indents: list[int] = []
    for line in intermediate.splitlines():
        indent = len(line) - len(line.lstrip())
        while loop_indents and indent <= loop_indents[-1] and line.lstrip().startswith("}"):
            loop_indents.pop()
        commits += bool(loop_indents) and COMMIT in line
        if "scf.for" in line or "scf.while" in line:
            loop_indents.append(indent)
    return commits


def _disassemble(program: str, binary: str, *options: str) -> str:
    command = [str(DISASSEMBLERS / program), *options, binary]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _check(codes: Iterator[MachineCode], num_variants: int) -> tuple[list[MachineCode], int, bool]:
    """Write a line per variant as it is done. Returns the codes, how many have faults, and whether one is too long."""
    budgets = {family.name: instruction_budget.read(family.name) for family in FAMILIES}
    done: list[MachineCode] = []
    num_faulty, is_overrun = 0, False
    for code in codes:
        overrun = instruction_budget.find_overrun(code, budgets[family_of(code.variant).name])
        faults = [*find_faults(code), *([overrun] if overrun else [])]
        num_faulty += bool(faults)
        is_overrun |= overrun is not None
        done.append(code)
        cost = "" if code.cost is None or code.variant.loop is None else f"{code.cost:.3f}/{code.variant.loop.unit}"
        sys.stdout.write(
            f"{len(done):4}/{num_variants}  {code.variant.name:<58} shared {code.shared_bytes:>6}  "
            f"registers {code.registers:>3}  {cost:>15}  {code.seconds:5.1f} s  {'; '.join(faults) or 'ok'}\n"
        )
        sys.stdout.flush()
    return done, num_faulty, is_overrun


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(ARCHITECTURES), help="default: all")
    families = [family.name for family in FAMILIES]
    parser.add_argument("--family", action="append", choices=families, help="default: all")
    parser.add_argument("--sample", action="store_true", help="each kernel and tile once, as the tests do")
    parser.add_argument("--lower-budgets", action="store_true", help="keep instruction counts that fell, and new ones")
    options = parser.parse_args(arguments)
    if IS_INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    return options


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, 1 when a variant has a fault, 2 for bad use."""
    options = _parse(arguments)
    families = [family for family in FAMILIES if family.name in (options.family or [family.name])]
    variants = [
        variant
        for arch in options.arch or ARCHITECTURES
        for family in families
        for variant in (family.sample_variants if options.sample else family.all_variants)(arch)
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        codes, num_faulty, is_overrun = _check(pool.map(compile_variant, variants), len(variants))
    sys.stdout.write(f"{len(variants)} variants, {num_faulty} with faults\n")
    if is_overrun:
        sys.stdout.write(
            "an inner loop became longer, and budgets only fall: shorten it, or, where a longer one is worth it, edit "
            f"its number in {instruction_budget.DIRECTORY} by hand and say why in the commit\n"
        )
    if options.lower_budgets:
        names = {
            family.name: {variant.name for arch in ARCHITECTURES for variant in family.all_variants(arch)}
            for family in families
        }
        changes = instruction_budget.lower(codes, names)
        sys.stdout.write("".join(f"{count} budgets of {name} changed\n" for name, count in changes.items()))
    return 1 if num_faulty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
