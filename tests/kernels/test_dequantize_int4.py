"""A dequantized weight is the reference's, rounded once."""

import pytest
import torch

from kernels import reference
from kernels.dequantize_int4 import dequantize_int4
from kernels.layout import repack_int4_cpu
from tests.kernels.launches import HALF_TYPES, LAST_PLACE, fresh_memory_is_nan, planar_on_device
from tests.kernels.packed_weights import random_packed_weight


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", [(8, 576, 64), (130, 96, 32), (3, 256, 128)])
def test_the_dense_weight_is_the_references(shape: tuple[int, int, int], bits: int, dtype: torch.dtype) -> None:
    weight = random_packed_weight(*shape, bits=bits)

    with fresh_memory_is_nan():
        dense = dequantize_int4(planar_on_device(weight), dtype).cpu()

    # the interpreter rounds to bfloat16 towards zero, a GPU to nearest: one unit in the last place
    error = LAST_PLACE[dtype] if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(dense, reference.dequantize(weight).to(dtype), rtol=error, atol=0)


def test_what_it_cannot_read_or_write_is_refused() -> None:
    weight = random_packed_weight(8, 64, 32)

    with pytest.raises(ValueError, match="planar layout, not int4_cpu"):
        dequantize_int4(repack_int4_cpu(weight), torch.float16)
    with pytest.raises(ValueError, match=r"float16 or bfloat16, not torch\.float32"):
        dequantize_int4(planar_on_device(weight), torch.float32)
