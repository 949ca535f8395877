"""Draws a comparison of methods: perplexity and KL divergence of each, and the layers' errors over depth.

Drawing needs matplotlib, an optional extra: nothing else here asks for a library of that size.
"""

import importlib.util
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from quant.errors import RecipeError
from quant.method import Method
from quant.method_comparison import UNQUANTIZED, MethodTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLOCK_NUMBER = re.compile(r"\.(\d+)\.")
AXES_INCHES = (5.0, 4.5)
DOTS_PER_INCH = 120
UNQUANTIZED_COLOR = "0.6"


def check_plotting() -> None:
    """Raises RecipeError when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RecipeError(
            "drawing needs matplotlib, which is not installed: pip install 'awq-serve[plot]' (or matplotlib); "
            "or leave --plot out"
        )


def draw_methods(table: MethodTable) -> bytes:
    """The picture, as the bytes of a PNG file."""
    from matplotlib.figure import Figure  # the optional extra

    # matplotlib's own cycle of colors
    colors = {row.method.value: f"C{index}" for index, row in enumerate(table.results)}
    perplexities = {row.method.value: row.quality.perplexity for row in table.results}
    divergences = {row.method.value: row.quality.mean_kl or 0.0 for row in table.results}
    curves = errors_by_depth(table)
    num_axes = 3 if curves else 2
    figure = Figure((AXES_INCHES[0] * num_axes, AXES_INCHES[1]), DOTS_PER_INCH, layout="constrained")
    axes = [figure.add_subplot(1, num_axes, number + 1) for number in range(num_axes)]
    _draw_bars(axes[0], {UNQUANTIZED: table.original.perplexity, **perplexities}, colors)
    axes[0].set_title("perplexity")
    _draw_bars(axes[1], divergences, colors)
    axes[1].set_title(f"mean KL to {UNQUANTIZED} (nats)")
    if curves:
        _draw_curves(axes[2], curves, colors)
        axes[2].set_title("output error of a block's linears (mean share)")
    measured_on = f"{table.num_windows} windows of {table.window_tokens} tokens of {table.text}"
    figure.suptitle(f"{Path(table.source).name}\n{measured_on}", fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def errors_by_depth(table: MethodTable) -> dict[str, dict[int, float]]:
    """By method and block number: the mean output error of the block's linears, as a share of their output.

    Plain rounding measures none of its own; the first other report says what it would have cost there.
    """
    searched = next((row.report.layers for row in table.results if row.report.layers), ())
    curves = {}
    for row in table.results:
        if row.method is Method.RTN:
            errors = {layer.name: layer.plain for layer in searched}
        else:
            errors = {layer.name: layer.chosen for layer in row.report.layers}
        if errors:
            curves[row.method.value] = _mean_by_block(errors)
    return curves


def _mean_by_block(errors: Mapping[str, float]) -> dict[int, float]:
    by_block: dict[int, list[float]] = {}
    for name, error in errors.items():
        number = BLOCK_NUMBER.search(name)
        by_block.setdefault(int(number[1]) if number else 0, []).append(error)
    return {number: sum(values) / len(values) for number, values in sorted(by_block.items())}


def _draw_bars(axes: "Axes", values: Mapping[str, float], colors: Mapping[str, str]) -> None:
    drawn = axes.bar(
        list(values), list(values.values()), color=[colors.get(name, UNQUANTIZED_COLOR) for name in values]
    )
    axes.bar_label(drawn, fmt="{:.4g}")
    axes.tick_params(axis="x", rotation=30)


def _draw_curves(axes: "Axes", curves: Mapping[str, Mapping[int, float]], colors: Mapping[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), label=name, color=colors[name], marker=".")
    # errors of the first and the last blocks differ by orders of magnitude
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
