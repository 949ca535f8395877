"""Dense linears whose rows do not depend on how many there are: what `--deterministic` asks of them.

A matrix product sums in another order for another number of rows, as it is cut in other ways, and a last bit may turn
a near-tie. For one number of rows every row is summed alike, wherever it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from server.model.decoder import Decoder
from server.model.layers import DenseLinear

BLOCK_ROWS = 16

Part = TypeVar("Part")


@dataclass(frozen=True)
class FixedRowsLinear:
    """A dense linear over blocks of BLOCK_ROWS rows, the last one filled up with zeros.

    More rows than max_rows_together are of one sequence, which is as long alone: they are computed at once.
    """

    linear: DenseLinear
    max_rows_together: int

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = len(x)
        if num_rows > self.max_rows_together:
            return self.linear(x)
        padded = torch.nn.functional.pad(x, (0, 0, 0, -num_rows % BLOCK_ROWS))
        return torch.cat([self.linear(block) for block in torch.split(padded, BLOCK_ROWS)])[:num_rows]


def fix_rows(decoder: Decoder, max_rows_together: int) -> Decoder:
    """The decoder with each of its dense linears in fixed rows, wherever it is; the tensors are the same ones."""
    return _fix(decoder, max_rows_together)


def _fix(part: Part, max_rows_together: int) -> Part:
    changed = {
        field.name: fixed
        for field in fields(part)  # type: ignore[arg-type] # it is a dataclass wherever this is called
        if (fixed := _fix_value(value := getattr(part, field.name), max_rows_together)) is not value
    }
    return replace(part, **changed) if changed else part  # type: ignore[type-var]


def _fix_value(value: object, max_rows_together: int) -> object:
    if isinstance(value, DenseLinear):
        return FixedRowsLinear(value, max_rows_together)
    if isinstance(value, tuple):
        return _fix_all(value, max_rows_together)
    return _fix(value, max_rows_together) if is_dataclass(value) and not isinstance(value, type) else value


def _fix_all(values: Sequence[object], max_rows_together: int) -> Sequence[object]:
    fixed = tuple(_fix_value(value, max_rows_together) for value in values)
    return fixed if any(one is not other for one, other in zip(fixed, values, strict=True)) else values
