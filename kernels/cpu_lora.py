"""Low-rank adapters on a CPU: each tile of rows multiplies with its own adapter, in turn."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from kernels.lora import LORA_ROWS, AdapterRows, LoraStack, check_operands


def add_lora(out: Tensor, x: Tensor, stack: LoraStack, rows: AdapterRows) -> None:
    """Add to rows of out [T, N] what their adapters make of those of x [T, K]; the others are not touched.

    Every product is of LORA_ROWS rows, the last ones filled up with zeros: it sums a row alike wherever it stands.
    """
    check_operands(out, x, stack)
    rank = stack.rank
    for adapter, (start, stop) in zip(rows.tile_adapters.tolist(), rows.tile_rows.tolist(), strict=True):
        places = rows.order[start:stop]
        tile = x.new_zeros((LORA_ROWS, x.shape[1]))
        tile[: len(places)] = x[places]
        inner = torch.split(linear(tile, stack.down[adapter]), rank, dim=1)
        first = 0
        for of_part, width in zip(inner, stack.part_widths, strict=True):
            columns = slice(first, first + width)
            out[places, columns] += linear(of_part, stack.up[adapter, columns])[: len(places)]
            first += width
