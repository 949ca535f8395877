"""Phase 7: other tiles, timed beside the table's on the shapes that miss their goal; the better ones become data.

The choice is a bucket's, over all timed shapes of it. A tile is taken only where a row keeps its bits in every bucket.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from functools import partial
from itertools import product

from triton.errors import TritonError

from benchmarks.gpu_phases.bench import Bench, Item, NotAvailableError, Side
from benchmarks.gpu_phases.figures import Cell, Figure
from benchmarks.gpu_phases.linear import PHASE as LINEAR_PHASE
from benchmarks.gpu_phases.linear import ROWS
from benchmarks.gpu_phases.linear_sides import OurKernels
from benchmarks.gpu_phases.operands import random_rows, random_weight
from benchmarks.gpu_phases.sizes import HALF_TYPES, LinearCase
from benchmarks.gpu_phases.tile_choice import ARCH, BUCKET, GAIN, TABLE
from benchmarks.gpu_phases.verdicts import same_bits
from kernels.dispatch import MAX_GEMV_ROWS
from kernels.launch import INTERPRETED_ARCH
from kernels.tiles import FEW_ROWS_TILES, MANY_ROWS, MANY_ROWS_TILES, LinearTile, nearest_architecture

PHASE = "tune"
WHY_NOT = "why not"
# the rows that a bucket is timed with, by the largest number of rows in it
TIMED_ROWS = {"8": 1, "16": 16, "32": 32, "64": 64, MANY_ROWS: 2048}
# the first of those that miss, which are the largest models' most common ones: every one costs time for every tile
MAX_SHAPES = 4
COLUMNS, WARPS, STAGES = (128, 64), (4, 8), (4, 3, 5, 2)


def plan(bench: Bench) -> Sequence[Item]:
    return [Item(f"tiles for {bucket} rows", partial(_tune, bench, bucket)) for bucket in bench.sizes.tuned_buckets]


def _tune(bench: Bench, bucket: str) -> Iterator[Figure]:
    cases = _cases(bench, bucket)
    if not cases:
        raise NotAvailableError("no timed shape misses its goal there")
    arch = nearest_architecture(*divmod(bench.architecture, 10)) if bench.architecture else INTERPRETED_ARCH
    num_rows = min(TIMED_ROWS[bucket], bench.sizes.max_tuned_rows)
    trials = [_Trial(bench, case, num_rows) for case in cases]
    # a bucket of few rows fits its tile; of many, a tile may hold more of them
    row_counts = (64, 128) if bucket == MANY_ROWS else (int(bucket),)
    for candidate in _candidates(_current_tile(arch, bucket), row_counts)[: bench.sizes.max_tuned_tiles]:
        yield _try(bench, trials, arch, bucket, candidate)


def _cases(bench: Bench, bucket: str) -> list[LinearCase]:
    """The shapes that miss a goal in the bucket; the first ones of all, where none has been timed."""
    timed = [figure for figure in bench.findings.of(LINEAR_PHASE) if figure.number(ROWS) is not None]
    if not timed:
        return list(bench.sizes.linear[:MAX_SHAPES])
    missing = {
        figure.name
        for figure in timed
        if _bucket_of(round(figure.number(ROWS) or 0)) == bucket and not all(goal.is_met for goal in figure.goals)
    }
    return [case for case in bench.sizes.linear if str(case) in missing][:MAX_SHAPES]


def _bucket_of(num_rows: int) -> str:
    return next((bucket for bucket in TIMED_ROWS if bucket != MANY_ROWS and num_rows <= int(bucket)), MANY_ROWS)


class _Trial:
    """A shape and its operands: rows for the bucket, and rows for the others, which must get the same bits."""

    def __init__(self, bench: Bench, case: LinearCase, num_rows: int) -> None:
        dtype = HALF_TYPES[case.dtype]
        self.case = case
        self.kernels = OurKernels(bench, random_weight(bench, case.shape, case.group_size, seed=1))
        self.x = random_rows(bench, (max(num_rows, MAX_GEMV_ROWS), case.shape.num_inputs), dtype, seed=2)
        self.num_rows = num_rows

    def side(self) -> Side:
        return self.kernels.side(self.x[: self.num_rows])

    def keeps_bits(self) -> bool:
        """Whether the first row gets the same bits in every bucket."""
        first_rows = [
            self.kernels.multiply(self.x[:num_rows])[:1] for num_rows in {1, 16, 32, MAX_GEMV_ROWS, self.num_rows}
        ]
        return all(same_bits(row, first_rows[0]) for row in first_rows)


def _try(bench: Bench, trials: Sequence[_Trial], arch: int, bucket: str, candidate: LinearTile) -> Figure:
    """The candidate beside the table's tile, in turn. One that cannot be launched has no gain and says why."""
    cells: dict[str, Cell] = {ARCH: arch, BUCKET: bucket, **asdict(candidate)}
    name = f"sm{arch}, {bucket}, {candidate.num_rows}x{candidate.num_columns}"
    gains = []
    try:
        for trial in trials:
            table_run = bench.stopwatch.prepare(trial.side().calls)
            with _tile_in_table(arch, bucket, candidate):
                if not trial.keeps_bits():
                    return Figure(TABLE, name, {**cells, GAIN: None, WHY_NOT: f"other bits for {trial.case.shape}"})
                run = bench.stopwatch.prepare(trial.side().calls)
                seconds = bench.stopwatch.compare({"table": table_run, "candidate": run}, bench.sizes.num_rounds)
            gains.append(min(seconds["table"]) / min(seconds["candidate"]))
    except (TritonError, RuntimeError) as error:
        # too much shared memory, or what the compiler cannot do; a device that is broken says so here again
        bench.stopwatch.wait()
        return Figure(TABLE, name, {**cells, GAIN: None, WHY_NOT: f"{type(error).__name__}: {error}".splitlines()[0]})
    return Figure(TABLE, name, {**cells, GAIN: math.prod(gains) ** (1 / len(gains)), WHY_NOT: None})


def _candidates(current: LinearTile, row_counts: Sequence[int]) -> list[LinearTile]:
    """Other tiles; those that differ least from the table's come first."""
    tiles_of_all = [
        LinearTile(num_rows, num_columns, num_warps, num_stages)
        for num_rows, num_columns, num_warps, num_stages in product(row_counts, COLUMNS, WARPS, STAGES)
    ]
    others = [tile for tile in tiles_of_all if tile != current]
    return sorted(
        others, key=lambda tile: sum(one != other for one, other in zip(astuple(tile), astuple(current), strict=True))
    )


def _current_tile(arch: int, bucket: str) -> LinearTile:
    return MANY_ROWS_TILES[arch] if bucket == MANY_ROWS else FEW_ROWS_TILES[arch][int(bucket)]


@contextmanager
def _tile_in_table(arch: int, bucket: str, tile: LinearTile) -> Iterator[None]:
    """Within, the wrappers find the tile in their table. Nothing else runs in this process."""
    before = _current_tile(arch, bucket)
    _put(arch, bucket, tile)
    try:
        yield
    finally:
        _put(arch, bucket, before)


def _put(arch: int, bucket: str, tile: LinearTile) -> None:
    if bucket == MANY_ROWS:
        MANY_ROWS_TILES[arch] = tile
    else:
        # architectures share their tables
        FEW_ROWS_TILES[arch] = {**FEW_ROWS_TILES[arch], int(bucket): tile}
