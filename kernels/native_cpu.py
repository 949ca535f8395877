"""The native CPU kernels: the compiled library, its threads, and how a program runs on them.

Legend: T = rows (tokens) of the step, N = outputs, K = inputs, D = head width.
"""

import ctypes
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.layout import PackedWeight
from kernels.native_build import NativeUnavailable, build_native
from kernels.native_program import KEYS_PER_VECTOR, Buffer, Program, ProgramBuilder
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.tile_layout import activation_block

_ALIGNMENT = 64


class Step(ctypes.Structure):
    """What a program runs for; docs of the fields are in operation.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in (
            "num_rows", "num_sequences", "max_blocks", "block_size", "scratch_bytes",
        )),
        *((name, ctypes.c_void_p) for name in (
            "buffers", "scratch", "keys", "values", "cosines", "sines", "slots", "query_starts", "context_lens",
            "block_tables",
        )),
    )  # fmt: skip


@dataclass(frozen=True)
class AttentionInputs:
    """What a program's attention reads: caches of `allocate_native_layer`, cosines and sines float32 [T, D / 2]."""

    batch: AttentionBatch
    layers: Sequence[PagedLayer]
    cosines: Tensor
    sines: Tensor


# of its caches: half of float32's bytes, which is what long contexts are read by, and 11 significant bits
KV_DTYPE = torch.float16


def allocate_native_layer(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int) -> PagedLayer:
    """A cache of the shape that all have, whose keys lie transposed in their block, as the native attention reads them.

    Raises ValueError when the block size or the head width is no multiple of 16.
    """
    if block_size % KEYS_PER_VECTOR or head_dim % KEYS_PER_VECTOR:
        raise ValueError(
            f"the native CPU attention takes blocks and heads that are multiples of {KEYS_PER_VECTOR}, "
            f"not {block_size} tokens and {head_dim} elements"
        )
    keys = torch.empty(num_blocks, num_kv_heads, head_dim, block_size, dtype=KV_DTYPE).transpose(2, 3)
    return PagedLayer(keys, torch.empty(num_blocks, num_kv_heads, block_size, head_dim, dtype=KV_DTYPE))


class NativeCpu:
    """The library and its pool of threads. A program's result for a row never depends on the other rows, to the bit.

    The threads end with the object. Not for several threads of Python at once.
    """

    def __init__(self, library: Path, num_threads: int) -> None:
        """Raises NativeUnavailable when the library cannot be loaded, from a folder that forbids it for one."""
        try:
            functions = ctypes.CDLL(str(library))
        except OSError as error:
            raise NativeUnavailable(f"they cannot be loaded: {error}") from error
        functions.awq_pool_create.restype = ctypes.c_void_p
        functions.awq_pool_create.argtypes = [ctypes.c_int64]
        functions.awq_pool_destroy.restype = None
        functions.awq_pool_destroy.argtypes = [ctypes.c_void_p]
        self._run = functions.awq_run
        self._run.restype = None
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        self._num_threads = num_threads
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pool = functions.awq_pool_create(num_threads)
        weakref.finalize(self, functions.awq_pool_destroy, self._pool)
        self.name = library.name.partition("-")[0]

    @classmethod
    def open(cls, num_threads: int, announce: Callable[[str], None]) -> "NativeCpu":
        """Compile the library where it was not yet, and load it. Raises NativeUnavailable."""
        return cls(build_native(announce), num_threads)

    def run(
        self,
        program: Program,
        num_rows: int,
        given: Mapping[Buffer, Tensor],
        attention: AttentionInputs | None = None,
    ) -> None:
        """Run the program for so many rows. given: contiguous tensors in place of buffers, for what goes in and out.

        Every program that attends needs `attention`. Reads and writes beyond what it is given where shapes are wrong.
        """
        if num_rows == 0:
            return
        places = {buffer.index: tensor.data_ptr() for buffer, tensor in given.items()}
        sizes = [
            0 if buffer.index in places else _align(_align(buffer.bytes_per_row * num_rows) + _ALIGNMENT)
            for buffer in program.buffers
        ]
        num_keys = attention.batch.max_context_len + 2 * KEYS_PER_VECTOR if attention else 0
        scratch_bytes = _align(max(program.scratch_bytes, program.scratch_bytes_per_key * num_keys))
        scratch = self._reserve(sum(sizes) + scratch_bytes * self._num_threads)
        start = scratch + scratch_bytes * self._num_threads
        for index, size in enumerate(sizes):
            places.setdefault(index, start)
            start += size
        buffers = (ctypes.c_void_p * len(sizes))(*(places[index] for index in range(len(sizes))))
        step = Step(num_rows=num_rows, scratch_bytes=scratch_bytes, buffers=ctypes.addressof(buffers), scratch=scratch)
        kept = _add_attention(step, attention) if attention else ()
        self._run(self._pool, program.operations, len(program.operations), ctypes.byref(step))
        del kept

    def _reserve(self, size: int) -> int:
        """The address of so much memory. It is kept: fresh memory costs a page fault for every 4 KiB of each step."""
        if len(self._memory) < size + _ALIGNMENT:
            self._memory = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        return _align(self._memory.data_ptr())


class NativeLinear:
    """A TILES weight [N, K] and a float32 bias [N], ready to be multiplied with."""

    def __init__(self, cpu: NativeCpu, weight: PackedWeight, bias: Tensor | None = None) -> None:
        self._cpu = cpu
        self._shape = weight.shape
        num_outputs, num_inputs = weight.shape
        block = activation_block(weight.group_size)
        builder = ProgramBuilder()
        self._source, self._target = builder.floats(num_inputs), builder.floats(num_outputs)
        rounded = builder.rounded(num_inputs, block)
        builder.quantize(self._source, rounded, num_inputs, block)
        builder.linear(rounded, self._target, weight, bias)
        self._program = builder.finish()

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [M, K] to float32 [M, N]. Raises ValueError for another width or dtype."""
        num_outputs, num_inputs = self._shape
        if x.shape[1:] != (num_inputs,) or x.dtype != torch.float32:
            raise ValueError(f"x is {x.dtype} {list(x.shape)}; the weight takes float32 with K={num_inputs}")
        output = torch.empty(len(x), num_outputs)
        self._cpu.run(self._program, len(x), {self._source: x.contiguous(), self._target: output})
        return output


def _add_attention(step: Step, attention: AttentionInputs) -> tuple[object, ...]:
    """Fill in what attention reads; the result must live until the step has run."""
    batch, layers = attention.batch, attention.layers
    keys, values = (
        (ctypes.c_void_p * len(layers))(*(cache.data_ptr() for cache in caches))
        for caches in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
    )
    tensors = (
        attention.cosines.contiguous(),
        attention.sines.contiguous(),
        batch.slot_mapping.contiguous(),
        batch.query_starts.contiguous(),
        batch.context_lens.contiguous(),
        batch.block_tables.contiguous(),
    )
    step.num_sequences = len(batch.context_lens)
    step.max_blocks = batch.block_tables.shape[1]
    step.block_size = layers[0].block_size
    step.keys, step.values = ctypes.addressof(keys), ctypes.addressof(values)
    for name, tensor in zip(
        ("cosines", "sines", "slots", "query_starts", "context_lens", "block_tables"), tensors, strict=True
    ):
        setattr(step, name, tensor.data_ptr())
    return keys, values, tensors


def _align(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
