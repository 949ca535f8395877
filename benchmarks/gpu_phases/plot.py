"""The record of a run as a picture: linear layers, attention, the whole model. Only where matplotlib is installed."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_phases.figures import Figure
from benchmarks.gpu_phases.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(record: Record, path: Path) -> bool:
    """Write the picture; False where there is nothing to draw yet."""
    linear = [figure for figure in record.figures_of("linear") if figure.number("rows") is not None]
    decode = [figure for figure in record.figures_of("end_to_end") if figure.number("step ms") is not None]
    if not linear and not decode:
        return False
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(15, 4.5), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    _draw_lines(left, linear, "% of copy", "share of measured copy bandwidth, %")
    _draw_lines(middle, linear, "cuBLAS / ours", "times as fast as cuBLAS in 16 bits")
    middle.axhline(1, color="grey", linewidth=0.8)
    _draw_bars(right, decode)
    rehearsal = " (a rehearsal: times mean nothing)" if record.is_rehearsal else ""
    picture.suptitle(f"{record.device}{rehearsal}")
    picture.savefig(path, dpi=110)
    return True


def _draw_lines(axes: "Axes", figures: Sequence[Figure], column: str, label: str) -> None:
    for name in dict.fromkeys(figure.name for figure in figures):
        points = sorted(
            (figure.number("rows") or 0, figure.number(column) or 0) for figure in figures if figure.name == name
        )
        axes.plot([rows for rows, _ in points], [value for _, value in points], marker="o", markersize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rows of activations")
    axes.set_ylabel(label)
    if figures:
        axes.legend(fontsize=6)


def _draw_bars(axes: "Axes", figures: Sequence[Figure]) -> None:
    ordered = sorted(figures, key=lambda figure: figure.number("streams") or 0)
    places = range(len(ordered))
    floors = [figure.number("roofline tokens/s") or 0 for figure in ordered]
    reached = [figure.number("tokens/s") or 0 for figure in ordered]
    axes.bar(places, floors, color="lightgrey", label="what the memory allows")
    axes.bar(places, reached, width=0.5, label="measured")
    axes.set_xticks(list(places), [f"{figure.number('streams'):.0f}" for figure in ordered])
    axes.set_xlabel("streams")
    axes.set_ylabel("tokens per second")
    axes.legend(fontsize=7)
