"""The native kernels of every instruction set that the running CPU has, compiled once into the user's cache."""

import functools

import pytest

from kernels.native_build import (
    CPUINFO,
    InstructionSet,
    NativeBuild,
    NativeUnavailable,
    default_cache,
    find_compiler,
    instruction_sets_of,
    running_instruction_set,
)
from kernels.native_cpu import NativeCpu


def running_instruction_sets() -> tuple[InstructionSet, ...]:
    try:
        best = running_instruction_set()
    except NativeUnavailable:
        return ()
    flags = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    found = instruction_sets_of(frozenset(flags.partition(":")[2].split()))
    assert found[0] is best
    return found


@functools.cache
def open_native(name: str | None = None) -> NativeCpu:
    """With two threads; the best instruction set unless one is named. Skips the test where there is no compiler."""
    sets = {candidate.name: candidate for candidate in running_instruction_sets()}
    if not sets:
        pytest.skip("the native kernels are for x86-64 Linux and a CPU with AVX2")
    chosen = sets[name] if name else next(iter(sets.values()))
    try:
        compiler = find_compiler()
    except NativeUnavailable as unavailable:
        pytest.skip(str(unavailable))
    return NativeCpu(NativeBuild(chosen, compiler, default_cache()).make(lambda sentence: None), 2)
