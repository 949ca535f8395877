"""From the tuner's figures to the table that the kernels launch with."""

import json
from pathlib import Path

from benchmarks.gpu_phases.figures import Cell, Figure
from benchmarks.gpu_phases.tile_choice import ARCH, BUCKET, GAIN, TABLE, choose, write_choice
from kernels.tiles import MANY_ROWS, LinearTile, read_tuned_tiles


def tried(bucket: str, num_columns: int, gain: float | None) -> Figure:
    tile: dict[str, Cell] = {"num_rows": 16, "num_columns": num_columns, "num_warps": 4, "num_stages": 3}
    return Figure(TABLE, "a tile", {ARCH: 90, BUCKET: bucket, **tile, GAIN: gain})


def test_the_fastest_tile_of_a_bucket_is_chosen_where_it_gains_enough() -> None:
    chosen = choose([tried("16", 64, 1.2), tried("16", 128, 1.4), tried("16", 256, None), tried("32", 64, 1.01)])

    assert chosen == {"90": {"16": {"num_rows": 16, "num_columns": 128, "num_warps": 4, "num_stages": 3}}}


def test_the_kernels_read_what_the_tuner_writes_and_older_choices_stay(tmp_path: Path) -> None:
    # given tiles of another GPU, and of another bucket of this one
    path = tmp_path / "tuned_tiles.json"
    older = {"num_rows": 8, "num_columns": 32, "num_warps": 2, "num_stages": 2}
    path.write_text(json.dumps({"89": {"8": older}, "90": {"8": older, "16": older}}))

    write_choice(choose([tried("16", 128, 1.4), tried(MANY_ROWS, 64, 1.1)]), path)

    table = read_tuned_tiles(path)
    assert table["89"] == {"8": LinearTile(8, 32, 2, 2)}
    assert table["90"]["8"] == LinearTile(8, 32, 2, 2)
    assert table["90"]["16"] == LinearTile(16, 128, 4, 3)
    assert table["90"][MANY_ROWS] == LinearTile(16, 64, 4, 3)


def test_without_a_file_nothing_is_tuned(tmp_path: Path) -> None:
    assert read_tuned_tiles(tmp_path / "absent.json") == {}
