"""From the tuner's figures to the file of tiles that `kernels/tiles.py` reads. Imports no torch."""

import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.gpu_phases.figures import Figure
from benchmarks.json_file import write_json

TABLE = "Tiles beside those of the table"
ARCH, BUCKET, GAIN = "arch", "up to rows", "times as fast"
# of a tile, as kernels/tiles.py calls them
FIELDS = ("num_rows", "num_columns", "num_warps", "num_stages")
# less than this is within what two runs of the same tile differ by
MIN_GAIN = 1.02

# by architecture, then by bucket
TileTable = dict[str, dict[str, dict[str, int]]]


def choose(figures: Iterable[Figure]) -> TileTable:
    """The fastest tile of each architecture and bucket, where it gains enough to be no accident."""
    best: dict[tuple[str, str], Figure] = {}
    for figure in figures:
        gain = figure.number(GAIN)
        if figure.table != TABLE or gain is None or gain < MIN_GAIN:
            continue
        place = (str(figure.values[ARCH]), str(figure.values[BUCKET]))
        if place not in best or gain > (best[place].number(GAIN) or 0):
            best[place] = figure
    table: TileTable = {}
    for (arch, bucket), figure in best.items():
        table.setdefault(arch, {})[bucket] = {name: round(figure.number(name) or 0) for name in FIELDS}
    return table


def write_choice(chosen: TileTable, path: Path) -> None:
    """Put the chosen tiles into the file, beside what it says of other architectures and buckets."""
    table: TileTable = json.loads(path.read_text()) if path.exists() else {}
    for arch, tiles in chosen.items():
        table[arch] = {**table.get(arch, {}), **tiles}
    write_json(path, table)
