"""Cuts weights by rows, for work that makes several float32 copies of what it is given and treats rows alike."""

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.device import CUDA

# what the rows worked on at a time take: a few copies of them are small beside a block
SPAN_BYTES = 2**25
# on a GPU, where work on few rows takes as long as on many: most weights in one
GPU_SPAN_BYTES = 2**28


def row_spans(matrix: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix [N, K], in order, as many at a time as `rows_of_span` says. Views, not copies."""
    return iter(torch.split(matrix, rows_of_span(matrix.shape[1] * matrix.element_size(), matrix.device)))


def rows_of_span(row_bytes: int, device: torch.device) -> int:
    """How many rows of that size take SPAN_BYTES, on a GPU GPU_SPAN_BYTES; at least one."""
    return max(1, (GPU_SPAN_BYTES if device.type == CUDA else SPAN_BYTES) // max(1, row_bytes))
