"""Every kernel compiles for every architecture that we promise, without a GPU, into code that can launch and is fast.

One compilation for each kernel and each tile of the tables; dtypes, group sizes and outputs are taken in turn.
`python -m kernels.compile` makes all combinations.
"""

import os
import subprocess
import sys

import pytest

from kernels.tiles import ARCHITECTURES, FEW_ROWS_TILES
from kernels.variants import FAMILIES, KERNELS, all_variants, family_of, sample_variants

# a compilation takes about a second of one core; a busy machine may need many times that
TIMEOUT_SECONDS = 900
ARCHS = pytest.mark.parametrize("arch", sorted(ARCHITECTURES))


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
@ARCHS
def test_each_kernel_and_tile_compiles_without_a_fault_within_its_budget(arch: int) -> None:
    # this process interprets kernels; the one that compiles must not
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    result = compile_in_a_process("--sample", "--arch", str(arch), environment=environment)

    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok\n") == len(sample_variants(arch))


def test_an_interpreted_kernel_is_not_compiled() -> None:
    result = compile_in_a_process(environment={**os.environ, "TRITON_INTERPRET": "1"})

    assert result.returncode == 2
    assert "unset TRITON_INTERPRET" in result.stderr


@ARCHS
def test_the_sample_has_every_kernel_tile_dtype_and_group(arch: int) -> None:
    sample = sample_variants(arch)

    assert {variant.kernel for variant in sample} == set(KERNELS)
    assert {f"{tile.num_rows}x{tile.num_columns}" for tile in FEW_ROWS_TILES[arch].values()} <= {
        variant.label.split()[0] for variant in sample if variant.kernel == "gemv_int4_kernel"
    }
    labels = " ".join(variant.label for variant in sample)
    assert all(name in labels for name in ("fp16", "bf16", "g32 ", "g64 ", "g128 ", "parts", "direct"))


@ARCHS
def test_the_sample_is_part_of_everything(arch: int) -> None:
    assert set(sample_variants(arch)) <= set(all_variants(arch))


@ARCHS
def test_every_variant_has_a_name_and_every_argument_of_it_is_named_once(arch: int) -> None:
    variants = all_variants(arch)

    assert len({variant.name for variant in variants}) == len(variants)
    for variant in variants:
        names = [name for name, _ in (*variant.arguments, *variant.constants)]
        assert len(names) == len(set(names))


def test_a_kernel_belongs_to_one_family() -> None:
    assert len(KERNELS) == sum(len(family.kernels) for family in FAMILIES)
    assert all(family_of(variant).name for variant in all_variants(90))
