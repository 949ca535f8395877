"""Where the Triton tests put their tensors, and memory that shows when it is read before it is written."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from kernels import layout
from kernels.launch import IS_INTERPRETED
from kernels.layout import PackedWeight, repack_planar

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
HALF_TYPES = [torch.float16, torch.bfloat16]
# one unit in the last place: our sum and the reference's may fall on two sides of a rounding border
LAST_PLACE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def planar_on_device(weight: PackedWeight) -> PackedWeight:
    """The ROW_MAJOR weight as the kernels read it, where they read it."""
    return layout.planar_on_device(repack_planar(weight), DEVICE)


@contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """Within, `torch.empty` gives NaN or the least integer: a kernel that leaves or reads an unwritten place shows."""
    empty = torch.empty

    def empty_with_nan(size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        filling = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        return empty(size, dtype=dtype, device=device).fill_(filling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty_with_nan)
        yield
