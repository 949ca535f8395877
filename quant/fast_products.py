"""Matrix products of float32 that may read bfloat16, as models are run. For runs of a model, not for searches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from kernels.cpu import cpu_traits
from quant.device import CUDA

_ATTENTION: object = functional.scaled_dot_product_attention


@contextmanager
def fast_products() -> Iterator[None]:
    """Products and attention read bfloat16 where the processor has instructions for that, and add up in float32.

    On a GPU products read TF32 where it has it, which is finer.
    Only what is multiplied is rounded, by a relative 2^-9 at most, and what attention gives: the states between the
    products, and all sums over tokens, stay in float32. That is several times as fast, and its noise is far below that
    of rounding to 4 bits.
    Not for shapes that change all the time, as attention over a growing cache: each is compiled for, and kept.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with _FastAttention():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_dtype(device: torch.device) -> torch.dtype:
    """What products on the device read at most under `fast_products`: a factor kept in it gives the same bits."""
    # TF32 has the exponents of float32 and 10 bits behind them, and no dtype of its own
    return torch.float32 if device.type == CUDA else cpu_traits().dense_dtype


def attention_dtype(device: torch.device) -> torch.dtype:
    """What attention over float32 on the device reads under `fast_products`."""
    # of a GPU's kernels that hold no scores of all pairs of tokens, those for grouped heads read nothing wider
    return torch.bfloat16 if device.type == CUDA else product_dtype(device)


class _TorchFunction(Protocol):
    def __call__(self, *args: object, **kwargs: object) -> object: ...


class _FastAttention(TorchFunctionMode):
    """Attention over float32 in bfloat16: torch's own reads float32 whatever precision is allowed."""

    def __torch_function__(
        self,
        func: _TorchFunction,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = kwargs or {}
        if func is not _ATTENTION or not _reads_bfloat16(*args, *named.values()):
            return func(*args, **named)
        output = func(*map(_shorten, args), **{name: _shorten(value) for name, value in named.items()})
        return output.float() if isinstance(output, Tensor) else output


def _reads_bfloat16(*arguments: object) -> bool:
    """Whether attention over these, which are on one device, reads bfloat16."""
    tensors = (argument for argument in arguments if isinstance(argument, Tensor))
    return any(attention_dtype(tensor.device) is torch.bfloat16 for tensor in tensors)


def _shorten(value: object) -> object:
    return value.bfloat16() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
