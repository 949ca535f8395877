"""Instructions per weight of the INT4 loops, beside a plain kernel's and gemlite's, from machine code, without a GPU.

`python -m benchmarks.instructions` prints the table; `--write` puts it into docs/performance.md. gemlite's rows need
gemlite: in a directory of its own on PYTHONPATH is enough.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton

from benchmarks import gemlite_kernel
from benchmarks.plain_int4 import plain_int4_kernel
from kernels.compile import compile_kernel, compile_variant
from kernels.linear_variants import WEIGHTS, few_rows_variant
from kernels.tiles import few_rows_tile
from kernels.variant import LoopRules, Variant

DOCUMENT = Path("docs/performance.md")
BEGIN, END = "<!-- instructions: begin -->", "<!-- instructions: end -->"
ARCHS = (80, 89, 90, 100)
ROWS = (1, 16, 32, 64)
GROUP_SIZE = 128
KINDS = {"fp16": WEIGHTS[2], "bf16": WEIGHTS[5]}
# the tile that a plain kernel is fast with, and the smallest row count that its product takes everywhere
PLAIN_COLUMNS, PLAIN_INPUTS, PLAIN_ROWS = 64, 128, 16


@dataclass(frozen=True)
class Cell:
    """One figure. row: of the table. cost: instructions per weight, None where the compiler could not make it."""

    row: str
    arch: int
    num_rows: int
    cost: float | None


def plain_variant_of(arch: int, num_rows: int) -> Variant:
    """The plain kernel at fp16 for a row count."""
    half = "*fp16:16"
    arguments = {
        "x_ptr": half, "words_ptr": "*i32:16", "scales_ptr": half, "zeros_ptr": half, "out_ptr": half,
        "num_rows": "i32", "num_columns": "i32:16", "num_inputs": "i32:16",
    }  # fmt: skip
    constants = {
        "GROUP_SIZE": GROUP_SIZE,
        "TILE_ROWS": max(num_rows, PLAIN_ROWS),
        "TILE_COLUMNS": PLAIN_COLUMNS,
        "TILE_INPUTS": PLAIN_INPUTS,
    }
    units = PLAIN_COLUMNS * PLAIN_INPUTS / (32 * 4)
    return Variant(
        kernel="plain_int4_kernel",
        arch=arch,
        label=f"{num_rows} rows",
        arguments=tuple(arguments.items()),
        constants=tuple(constants.items()),
        num_warps=4,
        num_stages=3,
        loop=LoopRules("weight", units=units),
    )


def measure(arch: int, num_rows: int) -> list[Cell]:
    """The figures of one architecture and row count."""
    tile = few_rows_tile(arch, num_rows, GROUP_SIZE)
    cells = [
        Cell(f"this project, {dtype}", arch, num_rows,
             compile_variant(few_rows_variant(arch, tile, weights, is_split=True)).cost)
        for dtype, weights in KINDS.items()
    ]  # fmt: skip
    plain = compile_kernel(plain_int4_kernel, plain_variant_of(arch, num_rows)).cost
    cells.append(Cell("shift and mask, fp16", arch, num_rows, plain))
    if arch in gemlite_kernel.TUNED_GPUS and gemlite_kernel.is_installed():
        cells.append(Cell("gemlite, fp16", arch, num_rows, _measure_gemlite(arch, num_rows)))
    return cells


def _measure_gemlite(arch: int, num_rows: int) -> float | None:
    """None for one row, which it multiplies without tensor cores: the counter finds loops by them."""
    if num_rows == 1:
        return None
    variant = gemlite_kernel.variant_of(arch, num_rows, GROUP_SIZE)
    return compile_kernel(gemlite_kernel.load_kernel(arch), variant).cost


def format_table(cells: Sequence[Cell]) -> str:
    """A Markdown table: a line per kernel and architecture, a column per row count."""
    lines = [
        f"| loop | GPU | {' | '.join(f'{rows} rows' if rows > 1 else '1 row' for rows in ROWS)} |",
        f"|---|---|{'---:|' * len(ROWS)}",
    ]
    for row in dict.fromkeys(cell.row for cell in cells):
        for arch in dict.fromkeys(cell.arch for cell in cells if cell.row == row):
            costs = {cell.num_rows: cell.cost for cell in cells if (cell.row, cell.arch) == (row, arch)}
            figures = " | ".join("none" if costs[rows] is None else f"{costs[rows]:.2f}" for rows in ROWS)
            lines.append(f"| {row} | sm{arch} | {figures} |")
    return "\n".join([*lines, "", f"Triton {triton.__version__}, groups of {GROUP_SIZE}."])


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args(arguments)
    if options.write and not gemlite_kernel.is_installed():
        parser.error("--write needs gemlite, or its rows would be lost: pip install --no-deps --target DIR gemlite")
    pairs = [(arch, rows) for arch in ARCHS for rows in ROWS]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        cells = [cell for found in pool.map(measure, *zip(*pairs, strict=True)) for cell in found]
    table = format_table(cells)
    print(table)
    if options.write:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
