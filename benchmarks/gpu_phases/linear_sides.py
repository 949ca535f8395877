"""Those that multiply by a weight of 4 bits, or by the same in 16, on as many copies as the cache must not hold."""

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench, NotAvailableError, Side
from benchmarks.gpu_phases.operands import bytes_of, copies_of, prepare_for_kernels
from benchmarks.gpu_phases.stopwatch import Call
from kernels import reference
from kernels.dispatch import MAX_GEMV_ROWS
from kernels.gemm_int4 import gemm_int4
from kernels.gemv_int4 import gemv_int4
from kernels.layout import PackedWeight, unpack

# what no device of today exceeds: a guess for how many calls make a run
FASTEST_BYTES = 4e12
FASTEST_FLOPS = 8e14
# how torch's op packs K: multiples of 16 times this
INNER_K_TILES = 8
OFFSET = 8


class OurKernels:
    """The Triton kernels, as `dispatch` chooses them by the number of rows."""

    def __init__(self, bench: Bench, row_major: PackedWeight) -> None:
        weight = prepare_for_kernels(row_major, bench)
        self.num_bytes = bytes_of(weight)
        self._weights = copies_of(weight, bench.num_copies(self.num_bytes))

    def side(self, x: Tensor) -> Side:
        calls = [partial(_multiply, x, weight) for weight in self._weights]
        return _side(calls, x, self._weights[0], self.num_bytes)

    def multiply(self, x: Tensor) -> Tensor:
        return _multiply(x, self._weights[0])


class HalfWeights:
    """cuBLAS, through torch, on the dequantized weight in x's dtype."""

    def __init__(self, bench: Bench, row_major: PackedWeight, dtype: torch.dtype) -> None:
        dense = reference.dequantize(row_major).to(dtype)
        self._num_bytes = dense.numel() * dense.element_size()
        self._packed = row_major
        self._weights = [dense, *(dense.clone() for _ in range(bench.num_copies(self._num_bytes) - 1))]

    def side(self, x: Tensor) -> Side:
        calls = [partial(torch.nn.functional.linear, x, weight) for weight in self._weights]
        return _side(calls, x, self._packed, self._num_bytes)


class TorchInt4:
    """torch's own 4-bit op; it reads bfloat16 activations alone, and its scales are bfloat16."""

    def __init__(self, bench: Bench, row_major: PackedWeight) -> None:
        if bench.device.type != "cuda":
            raise NotAvailableError("torch's int4 op for GPUs needs a GPU")
        codes = unpack(row_major).codes
        # the even column in the high nibble: torchao, int4 tile packed layout
        words = (codes[:, 0::2] << 4) | codes[:, 1::2]
        packed = torch.ops.aten._convert_weight_to_int4pack(words.contiguous(), INNER_K_TILES)
        scales = row_major.scales.float()
        offsets = (OFFSET - row_major.zeros.float()) * scales
        metadata = torch.stack((scales, offsets), dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
        num_bytes = packed.numel() * packed.element_size() + metadata.numel() * metadata.element_size()
        self._num_bytes = num_bytes
        self._packed = row_major
        num_copies = bench.num_copies(num_bytes)
        self._weights = [(packed, metadata), *((packed.clone(), metadata.clone()) for _ in range(num_copies - 1))]

    def side(self, x: Tensor) -> Side:
        rounded, group_size = x.to(torch.bfloat16), self._packed.group_size
        multiply = torch.ops.aten._weight_int4pack_mm
        calls = [partial(multiply, rounded, words, group_size, metadata) for words, metadata in self._weights]
        return _side(calls, x, self._packed, self._num_bytes)


class Gemlite:
    """gemlite's Triton kernels, where its package was carried along."""

    def __init__(self, bench: Bench, row_major: PackedWeight) -> None:
        if importlib.util.find_spec("gemlite") is None:
            raise NotAvailableError("the package gemlite is not here")
        if bench.device.type != "cuda":
            raise NotAvailableError("gemlite needs a GPU")
        from gemlite.core import DType, GemLiteLinear

        num_columns, num_inputs = row_major.shape
        self._packed = row_major
        self._num_bytes = bytes_of(row_major)
        self._layers: list[Callable[[Tensor], object]] = []
        for _ in range(bench.num_copies(self._num_bytes)):
            layer = GemLiteLinear(
                row_major.bits,
                group_size=row_major.group_size,
                in_features=num_inputs,
                out_features=num_columns,
                input_dtype=DType.FP16,
                output_dtype=DType.FP16,
            )
            layer.pack(unpack(row_major).codes, row_major.scales, row_major.zeros.to(torch.float16), None)
            self._layers.append(layer)

    def side(self, x: Tensor) -> Side:
        return _side([partial(layer, x) for layer in self._layers], x, self._packed, self._num_bytes)


def _multiply(x: Tensor, weight: PackedWeight) -> Tensor:
    return (gemv_int4 if len(x) <= MAX_GEMV_ROWS else gemm_int4)(x, weight)


def _side(calls: Sequence[Call], x: Tensor, weight: PackedWeight, num_bytes: int) -> Side:
    num_columns, num_inputs = weight.shape
    seconds = num_bytes / FASTEST_BYTES + 2 * len(x) * num_columns * num_inputs / FASTEST_FLOPS
    return Side(calls, seconds)
