"""How a check of correctness becomes a figure."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.gpu_phases.figures import Cell, Figure, Goal

# one unit in the last place: our sum and the reference's may fall on two sides of a rounding border
LAST_PLACE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# of float32 sums over K, relative to the sum of their terms' magnitudes
SUM_ERROR = 4e-6


def verdict(table: str, name: str, values: Mapping[str, Cell], *, passed: bool) -> Figure:
    """A check's row: its values, and whether all is as it must be."""
    return Figure(table, name, {**values, "passed": passed}, (Goal("passed", float(passed), 1.0),))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Two tensors of 16-bit numbers, bit for bit, also where both are NaN."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))


def share_of_allowed(out: Tensor, expected: Tensor, magnitudes: Tensor) -> float:
    """The largest error as a share of what rounding explains; infinite where a number is not one.

    expected, magnitudes: float64, a product of `out`'s shape and that of its operands' magnitudes.
    """
    allowed = LAST_PLACE[out.dtype] * expected.abs() + SUM_ERROR * magnitudes
    share = float(((out.double() - expected).abs() / allowed).max())
    return share if share == share else float("inf")
