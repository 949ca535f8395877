"""Lists of native operations, built once and run for the rows of any step. Mirrors kernels/native/operation.h.

Legend: T = rows (tokens) of the step, N = outputs, K = inputs, H = heads, D = head width.
"""

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from kernels.layout import NIBBLE_BITS, PackedWeight, WeightLayout
from kernels.tile_layout import TILE_OUTPUTS, activation_block

_FLOAT_TYPES = {torch.float32: 0, torch.float16: 1}
# attention takes keys in vectors of so many
KEYS_PER_VECTOR = 16
_FLOAT_BYTES = 4
# a rounded element is two bytes; a block of them has a scale and two sums
_ROUNDED_BYTES = 2
_BLOCK_SCALE_BYTES = 8
# an unpacked code is there twice
_UNPACKED_BYTES = 2
# the most tiles that a thread unpacks at once: MAX_TILES in program.cpp
_MAX_TILES = 8
# the most queries that a thread attends at once: MAX_QUERIES in attention.h
_MAX_QUERIES = 12


class Kind(IntEnum):
    QUANTIZE = 0
    GATE = 1
    LINEAR = 2
    ROTATE = 3
    ATTEND = 4
    NORM = 5


class Operation(ctypes.Structure):
    """One operation; docs of the fields are in operation.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "kind", "input", "output", "num_inputs", "num_outputs", "block", "bits", "group_size", "scale_type", "adds",
            "num_heads", "num_kv_heads", "head_dim", "layer", "window",
        )),
        ("epsilon", ctypes.c_float),
        ("softmax_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "bias", "norm", "query_norm", "key_norm")),
    )  # fmt: skip


@dataclass(frozen=True)
class Buffer:
    """A place that operations read and write, with so many bytes for each row."""

    index: int
    bytes_per_row: int


@dataclass(frozen=True)
class Norm:
    """x / rms(x) * weight; weight float32, as wide as what it normalizes."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True)
class HeadShape:
    """What attention needs to know of a layer. window: how many tokens a token sees back, None for all."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    window: int | None
    query_norm: Norm | None
    key_norm: Norm | None


@dataclass(frozen=True)
class Program:
    """Operations in the order in which they run. tensors: those that they point into, which must live as long.

    scratch_bytes, scratch_bytes_per_key: what each thread needs besides the buffers.
    """

    operations: "ctypes.Array[Operation]"
    buffers: tuple[Buffer, ...]
    tensors: tuple[Tensor, ...]
    scratch_bytes: int
    scratch_bytes_per_key: int


class ProgramBuilder:
    """Appends operations to a program that is not finished yet."""

    def __init__(self) -> None:
        self._operations: list[Operation] = []
        self._buffers: list[Buffer] = []
        self._tensors: list[Tensor] = []
        self._scratch_bytes = 0
        self._scratch_bytes_per_key = 0

    def floats(self, num_columns: int) -> Buffer:
        """A buffer of float32 [T, num_columns]."""
        return self._buffer(num_columns * _FLOAT_BYTES)

    def rounded(self, num_columns: int, block: int) -> Buffer:
        """A buffer of rows rounded to 11 bits, with a scale for each block of columns."""
        return self._buffer(num_columns * _ROUNDED_BYTES + num_columns // block * _BLOCK_SCALE_BYTES)

    def quantize(self, source: Buffer, target: Buffer, num_columns: int, block: int, norm: Norm | None = None) -> None:
        """Round rows, normalized first where there is a norm."""
        self._operations.append(
            Operation(
                kind=Kind.QUANTIZE, input=source.index, output=target.index, num_inputs=num_columns, block=block,
                norm=self._address(norm.weight if norm else None), epsilon=norm.epsilon if norm else 0.0,
            )
        )  # fmt: skip

    def gate(self, source: Buffer, target: Buffer, num_columns: int, block: int) -> None:
        """silu(first half of a row) * second half, rounded; num_columns of a half."""
        self._operations.append(
            Operation(kind=Kind.GATE, input=source.index, output=target.index, num_inputs=num_columns, block=block)
        )

    def linear(
        self, source: Buffer, target: Buffer, weight: PackedWeight, bias: Tensor | None, *, adds: bool = False
    ) -> None:
        """Rounded rows times a TILES weight; adds: to what the target holds. Raises ValueError for another layout."""
        if weight.layout is not WeightLayout.TILES:
            raise ValueError(f"the native CPU kernel reads the tiles layout, not {weight.layout.value}")
        num_outputs, num_inputs = weight.shape
        self._operations.append(
            Operation(
                kind=Kind.LINEAR, input=source.index, output=target.index, num_inputs=num_inputs,
                num_outputs=num_outputs, block=activation_block(weight.group_size),
                bits=4 if weight.bits in NIBBLE_BITS else 8, group_size=weight.group_size,
                scale_type=_FLOAT_TYPES[weight.scales.dtype], adds=int(adds), codes=self._address(weight.codes),
                scales=self._address(weight.scales), zeros=self._address(weight.zeros), bias=self._address(bias),
            )
        )  # fmt: skip
        self._scratch_bytes = max(self._scratch_bytes, _MAX_TILES * _UNPACKED_BYTES * TILE_OUTPUTS * num_inputs)

    def attend(self, qkv: Buffer, target: Buffer, shape: HeadShape, layer: int) -> None:
        """Rotate queries and keys, write keys and values to the layer's cache, and attend over it."""
        self._operations.append(
            Operation(
                kind=Kind.ROTATE, input=qkv.index, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim, layer=layer, epsilon=shape.query_norm.epsilon if shape.query_norm else 0.0,
                query_norm=self._address(shape.query_norm.weight if shape.query_norm else None),
                key_norm=self._address(shape.key_norm.weight if shape.key_norm else None),
            )
        )  # fmt: skip
        self._operations.append(
            Operation(
                kind=Kind.ATTEND, input=qkv.index, output=target.index, num_heads=shape.num_heads,
                num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, layer=layer, window=shape.window or 0,
                softmax_scale=shape.softmax_scale,
            )
        )  # fmt: skip
        self._scratch_bytes_per_key = max(self._scratch_bytes_per_key, _MAX_QUERIES * _FLOAT_BYTES)

    def norm(self, source: Buffer, target: Buffer, norm: Norm) -> None:
        """Normalize rows."""
        self._operations.append(
            Operation(
                kind=Kind.NORM, input=source.index, output=target.index, num_inputs=len(norm.weight),
                norm=self._address(norm.weight), epsilon=norm.epsilon,
            )
        )  # fmt: skip

    def finish(self) -> Program:
        return Program(
            operations=(Operation * len(self._operations))(*self._operations),
            buffers=tuple(self._buffers),
            tensors=tuple(self._tensors),
            scratch_bytes=self._scratch_bytes,
            scratch_bytes_per_key=self._scratch_bytes_per_key,
        )

    def _buffer(self, bytes_per_row: int) -> Buffer:
        buffer = Buffer(len(self._buffers), bytes_per_row)
        self._buffers.append(buffer)
        return buffer

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        kept = tensor.contiguous()
        self._tensors.append(kept)
        return kept.data_ptr()
