"""Low-rank adapters of a linear layer side by side, and which rows of a step go through which of them.

Legend: T = tokens of the step, A = rows of an adapter's, L = adapters, R = rank, N = out, K = in features, P = parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# the tensor cores multiply at least so many at a time: smaller ranks are padded with zeros
RANK_MULTIPLE = 16
# rows that are multiplied together, whatever their number: a row's bits depend on no other row
LORA_ROWS = 16
MAX_PARTS = 3


@dataclass(frozen=True)
class LoraStack:
    """What adapters add to a linear layer: to a row x of adapter l, part by part, x down[l]^T up[l]^T.

    down: [L, P * R, K], the parts one after the other; up: [L, N, R], with the adapter's scale in it, both in the dtype
    of the activations. part_widths: outputs of each part, of N altogether, as modules were joined. R is the largest
    rank, up to a multiple of RANK_MULTIPLE; what an adapter has less of, or not at all, is zero.
    """

    down: Tensor
    up: Tensor
    part_widths: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.up.shape[2]


@dataclass(frozen=True)
class AdapterRows:
    """order: int32 [A], the rows with an adapter, by adapter. tile_adapters: int32 [tiles].

    tile_rows: int32 [tiles, 2], the part of `order` that each tile multiplies, at most LORA_ROWS of one adapter.
    """

    order: Tensor
    tile_adapters: Tensor
    tile_rows: Tensor


def plan_rows(spans: Sequence[tuple[int, int, int]], device: torch.device) -> AdapterRows:
    """spans: (adapter, first row, last row + 1) of sequences that have one. On a GPU nothing is waited for."""
    order: list[int] = []
    adapters: list[int] = []
    tile_rows: list[tuple[int, int]] = []
    for adapter in sorted({adapter for adapter, _, _ in spans}):
        start = len(order)
        order += [row for owner, first, stop in spans if owner == adapter for row in range(first, stop)]
        for first in range(start, len(order), LORA_ROWS):
            adapters.append(adapter)
            tile_rows.append((first, min(first + LORA_ROWS, len(order))))
    return AdapterRows(*(_to_device(values, device) for values in (order, adapters, tile_rows)))


def check_operands(out: Tensor, x: Tensor, stack: LoraStack) -> None:
    """Raises ValueError, saying what would be right, for operands that do not fit."""
    num_inputs, num_outputs = stack.down.shape[2], stack.up.shape[1]
    if x.ndim != 2 or x.shape[1] != num_inputs:
        raise ValueError(f"x must be [T, {num_inputs}] for these adapters, not {list(x.shape)}")
    if out.shape != (len(x), num_outputs):
        raise ValueError(f"out must be [{len(x)}, {num_outputs}] for these adapters, not {list(out.shape)}")
    if sum(stack.part_widths) != num_outputs or not 1 <= len(stack.part_widths) <= MAX_PARTS:
        raise ValueError(f"1 to {MAX_PARTS} parts must have {num_outputs} outputs together, not {stack.part_widths}")
    if stack.down.shape[:2] != (len(stack.up), len(stack.part_widths) * stack.rank):
        raise ValueError(f"down is {list(stack.down.shape)}, and up {list(stack.up.shape)}: they are of other adapters")
    if not out.dtype == x.dtype == stack.down.dtype == stack.up.dtype:
        raise ValueError(f"adapters of {stack.down.dtype} take activations of that, not {x.dtype} and {out.dtype}")


def _to_device(values: Sequence[int] | Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.int32)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
