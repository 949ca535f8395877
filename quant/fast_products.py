"""Matrix products of float32 that may read bfloat16, as models are run. For runs of a model, not for searches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fast_products() -> Iterator[None]:
    """Matrix products read bfloat16, where the processor has instructions for that, and add up in float32.

    Only what is multiplied is rounded, by a relative 2^-9 at most: the states between the products, and all sums over
    tokens, stay in float32. That is several times as fast, and its noise is far below that of rounding to 4 bits.
    Not for shapes that change all the time, as attention over a growing cache: each is compiled for, and kept.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
