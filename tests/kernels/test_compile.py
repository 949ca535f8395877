"""Every kernel compiles for every architecture that we promise, without a GPU, into code that can launch and is fast.

One compilation for each kernel and each tile of the tables; dtypes, group sizes and outputs are taken in turn.
`python -m kernels.compile` makes all combinations.
"""

import dataclasses
import os
import subprocess
import sys

import pytest

from kernels.compile import DEFAULT_ARCHS, MachineCode, find_faults
from kernels.tiles import ARCHITECTURES, FEW_ROWS_TILES
from kernels.variants import KernelName, all_variants, sample_variants

# a compilation takes about a second of one core; a busy machine may need many times that
TIMEOUT_SECONDS = 900


def compile_in_a_process(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kernels.compile", *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env=environment,
        check=False,
    )


@pytest.mark.timeout(TIMEOUT_SECONDS)
@pytest.mark.parametrize("arch", DEFAULT_ARCHS)
def test_each_kernel_and_tile_compiles_without_a_fault(arch: int) -> None:
    # this process interprets kernels; the one that compiles must not
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    result = compile_in_a_process("--sample", "--arch", str(arch), environment=environment)

    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok\n") == len(sample_variants(arch))


def test_an_interpreted_kernel_is_not_compiled() -> None:
    result = compile_in_a_process(environment={**os.environ, "TRITON_INTERPRET": "1"})

    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize("arch", DEFAULT_ARCHS)
def test_the_sample_has_every_kernel_tile_dtype_and_group(arch: int) -> None:
    sample = sample_variants(arch)

    assert {variant.kernel for variant in sample} == set(KernelName.__args__)
    assert {f"{tile.num_rows}x{tile.num_columns}" for tile in FEW_ROWS_TILES[arch].values()} <= {
        variant.label.split()[0] for variant in sample if variant.kernel == "gemv_int4_kernel"
    }
    labels = " ".join(variant.label for variant in sample)
    assert all(name in labels for name in ("fp16", "bf16", "g32 ", "g64 ", "g128 ", "parts", "direct"))


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_argument_of_every_variant_is_named_once(arch: int) -> None:
    for variant in all_variants(arch):
        names = [name for name, _ in (*variant.arguments, *variant.constants)]
        assert len(names) == len(set(names))


def test_the_gate_finds_what_would_not_launch_or_be_slow() -> None:
    variant = sample_variants(89)[0]
    good = MachineCode(variant, 101_376, 255, 0, "LDGSTS.E.BYPASS.128 [R1], [R2]\nHMMA.16816.F32 R4, R8", 1.0)

    assert find_faults(good) == []
    assert (
        "101377 bytes of shared memory, the GPU has 101376"
        in find_faults(dataclasses.replace(good, shared_bytes=101_377))[0]
    )
    assert "spills" in find_faults(dataclasses.replace(good, stack_bytes=8))[0]
    assert "spills" in find_faults(dataclasses.replace(good, assembly=good.assembly + "\nSTL [R1], R2"))[0]
    assert len(find_faults(dataclasses.replace(good, assembly="LDGSTS.E.64 [R1]\nFFMA R1, R2"))) == 2
