"""Cuts weights by rows, for work that makes several float32 copies of what it is given and treats rows alike."""

from collections.abc import Iterator

import torch
from torch import Tensor

# what the rows worked on at a time take: a few copies of them are small beside a block
SPAN_BYTES = 2**25


def row_spans(matrix: Tensor) -> Iterator[Tensor]:
    """The rows of a matrix [N, K], in order, as many at a time as take SPAN_BYTES; at least one. Views, not copies."""
    return iter(torch.split(matrix, max(1, SPAN_BYTES // max(1, matrix.shape[1] * matrix.element_size()))))
