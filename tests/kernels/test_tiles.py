"""The tables of sizes: complete, and the choices from them a function of nothing but what they name."""

import pytest

from kernels.layout import PLANAR_TILE_COLUMNS
from kernels.tiles import (
    ARCHITECTURES,
    FEW_ROWS_TILES,
    MAX_FEW_ROWS,
    MIN_BLOCKS_PER_SPLIT,
    few_rows_tile,
    grouped_tile,
    head_tile,
    many_rows_tile,
    nearest_architecture,
    num_splits,
)

ARCHS = pytest.mark.parametrize("arch", sorted(ARCHITECTURES))


@ARCHS
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_row_count_has_a_tile_that_holds_it(arch: int, group_size: int) -> None:
    for num_rows in range(1, MAX_FEW_ROWS + 1):
        assert few_rows_tile(arch, num_rows, group_size).num_rows >= num_rows


@ARCHS
def test_columns_of_every_tile_divide_the_padding_of_the_layout(arch: int) -> None:
    tiles = [*FEW_ROWS_TILES[arch].values(), *(many_rows_tile(arch, group_size) for group_size in (32, 64, 128))]
    tiles += [grouped_tile(arch, num_rows, group_size) for num_rows in (16, 32, 64) for group_size in (32, 64, 128)]
    for tile in tiles:
        assert PLANAR_TILE_COLUMNS % tile.num_columns == 0


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), 80), ((8, 7), 86), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)]
)
def test_a_gpu_runs_as_the_newest_listed_one_that_is_not_newer(capability: tuple[int, int], arch: int) -> None:
    assert nearest_architecture(*capability) == arch


def test_a_gpu_before_ampere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"8\.0 or newer; this GPU has 7\.5"):
        nearest_architecture(7, 5)


def test_a_square_layer_of_an_8b_model_is_split_until_it_fills_an_h100() -> None:
    # 4096 / 128 = 32 tiles, 264 wanted: 8 splits of 4 blocks each are as many as K allows
    assert num_splits(90, 4096, 32) == 8
    # 28672 / 128 = 224 tiles: two splits pass 264
    assert num_splits(90, 28672, 32) == 2


@ARCHS
@pytest.mark.parametrize("num_columns", [8, 576, 4096, 128256])
@pytest.mark.parametrize("num_blocks", [1, 5, 32, 86, 112])
def test_no_split_is_shorter_than_the_pipeline_wants(arch: int, num_columns: int, num_blocks: int) -> None:
    splits = num_splits(arch, num_columns, num_blocks)

    assert splits == 1 or num_blocks / splits >= MIN_BLOCKS_PER_SPLIT


@pytest.mark.parametrize(("width", "tile"), [(8, 16), (64, 64), (80, 128), (96, 128), (128, 128)])
def test_heads_are_padded_to_a_power_of_two(width: int, tile: int) -> None:
    assert head_tile(width) == tile
