"""The picture of a comparison: a PNG of sensible size, drawn from what the reports say of each block."""

import struct
from dataclasses import replace

import pytest

from quant.evaluate import Quality
from quant.method_comparison import MethodResult, MethodTable
from quant.method_plot import draw_methods, errors_by_depth
from quant.recipe import Method, Recipe
from quant.report import LayerLoss, Report

LAYERS = (
    LayerLoss("model.layers.0.mlp.up_proj", "x", plain=0.4, chosen=0.1),
    LayerLoss("model.layers.0.mlp.down_proj", "x", plain=0.2, chosen=0.2),
    LayerLoss("model.layers.1.mlp.experts.7.up_proj", "x", plain=0.3, chosen=0.05),
)


def result(method: Method, layers: tuple[LayerLoss, ...]) -> MethodResult:
    report = Report(
        source="/models/tiny",
        recipe=Recipe(method=method),
        group_size=64,
        mixture=(),
        calibration=None,
        layers=layers,
        blocks=(),
        held_out=None,
        bits_per_weight=4.3,
        notes=(),
        seconds=1.0,
        peak_memory_bytes=1,
        device="cpu",
        peak_device_bytes=None,
    )
    return MethodResult(method, Quality(method.value, 12.0, 0.1, 0.9), 0.5, report)


TABLE = MethodTable(
    source="/models/tiny",
    original=Quality("original", 10.0, None, None),
    results=(result(Method.RTN, ()), result(Method.AWQ, LAYERS)),
    text="a text",
    num_windows=2,
    window_tokens=64,
)


def png_size(picture: bytes) -> tuple[int, int]:
    """Width and height as the file's first chunk has them."""
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


def test_the_errors_of_a_block_are_the_mean_over_its_linears() -> None:
    curves = errors_by_depth(TABLE)

    assert curves["awq"] == {0: pytest.approx(0.15), 1: pytest.approx(0.05)}
    # plain rounding measures none itself
    assert curves["rtn"] == {0: pytest.approx(0.3), 1: pytest.approx(0.3)}


def test_the_picture_is_a_png_that_fits_a_screen() -> None:
    width, height = png_size(draw_methods(TABLE))

    assert 1000 < width < 2500
    assert 400 < height < 1000


def test_without_errors_by_layer_the_picture_is_narrower() -> None:
    plain_only = replace(TABLE, results=TABLE.results[:1])

    assert png_size(draw_methods(plain_only))[0] < png_size(draw_methods(TABLE))[0]
