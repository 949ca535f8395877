"""How a check of correctness becomes a figure."""

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.gpu_phases.figures import Cell, Figure, Goal


def verdict(table: str, name: str, values: Mapping[str, Cell], *, passed: bool) -> Figure:
    """A check's row: its values, and whether all is as it must be."""
    return Figure(table, name, {**values, "passed": passed}, (Goal("passed", float(passed), 1.0),))


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Two tensors of 16-bit numbers, bit for bit, also where both are NaN."""
    return torch.equal(one.view(torch.int16), other.view(torch.int16))
