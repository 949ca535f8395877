"""Which codec reads which format: the one table between what a config says and how tensors are decoded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint import awq_gemm, awq_gemv, compressed_tensors, gptq
from quant.checkpoint.meta import CheckpointFormat, QuantizationMeta
from quant.checkpoint.stored_module import PackedSpec, StoredModule


@dataclass(frozen=True)
class Codec:
    """How one format stores a module.

    suffixes: the tensors that may make up the weight; the first one says that a module is quantized. value_suffixes:
    those whose values `check` looks at.
    """

    suffixes: tuple[str, ...]
    value_suffixes: tuple[str, ...]
    check: Callable[[StoredModule, QuantizationMeta], PackedSpec]
    decode: Callable[[str, Mapping[str, Tensor], PackedSpec], PackedWeight]


CODECS: dict[CheckpointFormat, Codec] = {
    CheckpointFormat.AWQ_GEMM: Codec(awq_gemm.SUFFIXES, (), awq_gemm.check, awq_gemm.decode),
    CheckpointFormat.AWQ_GEMV: Codec(awq_gemv.SUFFIXES, (), awq_gemv.check_gemv, awq_gemv.decode_gemv),
    CheckpointFormat.AWQ_GEMV_FAST: Codec(awq_gemv.SUFFIXES, (), awq_gemv.check_gemv_fast, awq_gemv.decode_gemv_fast),
    CheckpointFormat.GPTQ_V1: Codec(gptq.SUFFIXES, (gptq.GROUP_INDEX,), gptq.check, gptq.decode_v1),
    CheckpointFormat.GPTQ_V2: Codec(gptq.SUFFIXES, (gptq.GROUP_INDEX,), gptq.check, gptq.decode_v2),
    CheckpointFormat.COMPRESSED_TENSORS: Codec(
        compressed_tensors.SUFFIXES,
        (compressed_tensors.SHAPE, compressed_tensors.GROUP_INDEX),
        compressed_tensors.check,
        compressed_tensors.decode,
    ),
}
# the endings of the names that mark a quantized module in any format
MARKERS = tuple(dict.fromkeys(f".{codec.suffixes[0]}" for codec in CODECS.values()))
