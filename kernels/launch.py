"""What every Triton launch asks first: which GPU is this for, may the operands be read there, is it interpreted."""

# mypy: disable-error-code="untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles import nearest_architecture

# the interpreter (TRITON_INTERPRET=1) runs CPU tensors and knows no inline assembly
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)
# whose tiles the interpreter takes
INTERPRETED_ARCH = 90

# kernels say fma where they mean it: what a compiler version contracts must not change the bits
FUSE_FLOATS = False

HALF_TYPES = (torch.float16, torch.bfloat16)


@triton.jit
def operand(tensor: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """The tensor as an operand of arithmetic. The interpreter holds bfloat16 as bare bits: float32 has the values."""
    if INTERPRETED:
        tensor = tensor.to(tl.float32)
    return tensor


@triton.jit
def rounded(values: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """float32 values in dtype, rounded to nearest even. The interpreter's own cast to bfloat16 cuts the bits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values == values, bits + 0x7FFF + ((bits >> 16) & 1), bits | 0x400000)
        values = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        values = values.to(dtype)
    return values


def launch_arch(operands: dict[str, Tensor]) -> int:
    """The architecture in `tiles` to launch for. Raises ValueError when the named operands are not on one GPU."""
    devices = {tensor.device for tensor in operands.values()}
    if len(devices) > 1:
        placed = ", ".join(f"{name} on {tensor.device}" for name, tensor in operands.items())
        raise ValueError(f"all operands of a kernel must be on one device: {placed}")
    device = devices.pop()
    if device.type == "cuda":
        return nearest_architecture(*torch.cuda.get_device_capability(device))
    if IS_INTERPRETED:
        return INTERPRETED_ARCH
    raise ValueError(f"the Triton kernels read CUDA tensors, not tensors on {device}")


def check_half(name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the tensor is float16 or bfloat16."""
    if tensor.dtype not in HALF_TYPES:
        raise ValueError(f"{name} must be float16 or bfloat16 for the Triton kernels, not {tensor.dtype}")
