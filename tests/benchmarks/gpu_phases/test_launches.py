"""Every kernel that the phases use is launched once before them; here a few of these launches, interpreted."""

import pytest

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.launches import ROWS, all_launches
from kernels.dispatch import MAX_GEMV_ROWS
from kernels.tiles import FEW_ROWS_TILES


@pytest.mark.parametrize("index", [len(ROWS), 2 * len(ROWS) - 1, -1], ids=["few rows", "many rows", "attention"])
def test_a_launch_runs(bench: Bench, index: int) -> None:
    assert all_launches(bench)[index]() is None


def test_every_bucket_of_rows_is_launched() -> None:
    for tiles in FEW_ROWS_TILES.values():
        assert {next(bucket for bucket in tiles if rows <= bucket) for rows in ROWS[:-1]} == set(tiles)
    assert ROWS[-1] > MAX_GEMV_ROWS
