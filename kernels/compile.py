"""Compiles every kernel variant for GPUs that need not be here, and checks the machine code: the gate without a GPU.

`python -m kernels.compile [--arch 90 ...] [--sample]` prints a line per variant; exit code 1 if one of them fails.
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
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import gemm_int4, gemv_int4, paged_attention
from kernels.launch import FUSE_FLOATS, IS_INTERPRETED
from kernels.tiles import ARCHITECTURES
from kernels.variants import Variant, all_variants, sample_variants

KERNELS = {
    "gemv_int4_kernel": gemv_int4.gemv_int4_kernel,
    "sum_parts_kernel": gemv_int4.sum_parts_kernel,
    "gemm_int4_kernel": gemm_int4.gemm_int4_kernel,
    "decode_kernel": paged_attention.decode_kernel,
    "merge_kernel": paged_attention.merge_kernel,
    "prefill_kernel": paged_attention.prefill_kernel,
    "write_kv_kernel": paged_attention.write_kv_kernel,
}
# the architectures that the project promises; --arch chooses others of the table
DEFAULT_ARCHS = (80, 89, 90, 100)
DISASSEMBLERS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LOCAL_MEMORY = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class MachineCode:
    """What one variant became. shared_bytes, stack_bytes: of a program; registers: of a thread."""

    variant: Variant
    shared_bytes: int
    registers: int
    stack_bytes: int
    assembly: str
    seconds: float


def compile_variant(variant: Variant) -> MachineCode:
    """Compile for the variant's architecture and disassemble. Triton's own exception tells why one cannot be."""
    started = time.monotonic()
    kernel = KERNELS[variant.kernel]
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
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = _disassemble("cuobjdump", "-res-usage", binary.name)
        assembly = _disassemble("nvdisasm", "-c", binary.name)
    registers, stack_bytes = (int(re.findall(rf"\b{field}:(\d+)", usage)[0]) for field in ("REG", "STACK"))
    seconds = time.monotonic() - started
    return MachineCode(variant, int(compiled.metadata.shared), registers, stack_bytes, assembly, seconds)


def find_faults(code: MachineCode) -> list[str]:
    """What would keep the variant from launching, or make it slow though it compiles. Empty when all is well."""
    faults = []
    limit = ARCHITECTURES[code.variant.arch].shared_bytes
    if code.shared_bytes > limit:
        faults.append(f"needs {code.shared_bytes} bytes of shared memory, the GPU has {limit}")
    if code.stack_bytes or LOCAL_MEMORY.search(code.assembly):
        faults.append(f"spills registers to local memory ({code.stack_bytes} bytes of stack)")
    faults += [
        f"has no instruction like {pattern}"
        for pattern in code.variant.required
        if not re.search(pattern, code.assembly)
    ]
    return faults


def _disassemble(program: str, option: str, binary: str) -> str:
    return subprocess.run([DISASSEMBLERS / program, option, binary], check=True, capture_output=True, text=True).stdout


def _report(codes: Iterator[MachineCode], num_variants: int) -> int:
    """Write a line per variant as it is done. Returns how many have faults."""
    num_faulty = 0
    for done, code in enumerate(codes, start=1):
        faults = find_faults(code)
        num_faulty += bool(faults)
        name = f"sm{code.variant.arch} {code.variant.kernel} {code.variant.label}"
        sys.stdout.write(
            f"{done:4}/{num_variants}  {name:<58} shared {code.shared_bytes:>6}  registers {code.registers:>3}  "
            f"stack {code.stack_bytes:>4}  {code.seconds:5.1f} s  {'; '.join(faults) or 'ok'}\n"
        )
        sys.stdout.flush()
    return num_faulty


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code: 0, 1 when a variant has a fault, 2 for bad use."""
    parser = argparse.ArgumentParser(prog="python -m kernels.compile", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(ARCHITECTURES), help="default: all four")
    parser.add_argument("--sample", action="store_true", help="each kernel and tile once, as the tests do")
    options = parser.parse_args(arguments)
    if IS_INTERPRETED:
        parser.error("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    list_variants = sample_variants if options.sample else all_variants
    variants = [variant for arch in options.arch or DEFAULT_ARCHS for variant in list_variants(arch)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        num_faulty = _report(pool.map(compile_variant, variants), len(variants))
    sys.stdout.write(f"{len(variants)} variants, {num_faulty} with faults\n")
    return 1 if num_faulty else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
