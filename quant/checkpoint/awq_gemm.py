"""The AWQ gemm codec: packed weights to the tensors of the format and back. Pure: knows no file.

Legend: N = out features, K = in features, G = groups along K. The format stores the transpose of the linear's weight:
qweight int32 [K, N / 8], qzeros int32 [G, N / 8] (the true zero point), scales float16 or bfloat16 [G, N].
Source: AutoAWQ awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import (
    AWQ_COLUMNS_PER_WORD,
    GroupCodes,
    PackedWeight,
    pack,
    pack_awq_words,
    unpack,
    unpack_awq_words,
)
from quant.checkpoint.tensor_spec import TensorSpec
from quant.errors import CheckpointError, QuantizationError

BITS = 4
SUFFIXES = ("qweight", "qzeros", "scales")
SCALE_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class AwqGemmTensors:
    qweight: Tensor
    qzeros: Tensor
    scales: Tensor


def encode(weight: PackedWeight) -> AwqGemmTensors:
    """A ROW_MAJOR 4-bit weight as AWQ gemm tensors, scales in float16.

    Raises ValueError when N is no multiple of 8, QuantizationError when a scale does not survive float16.
    """
    plain = unpack(weight)
    if plain.bits != BITS:
        raise ValueError(f"the AWQ gemm format holds 4-bit codes, not {plain.bits}-bit ones")
    scales = plain.scales.T.to(torch.float16).contiguous()
    if not torch.isfinite(scales).all() or bool(((scales == 0) & (plain.scales.T != 0)).any()):
        smallest, largest = (float(x) for x in plain.scales.float().abs().aminmax())
        raise QuantizationError(f"scales from {smallest:.3g} to {largest:.3g} do not fit float16")
    return AwqGemmTensors(
        qweight=pack_awq_words(plain.codes.T.contiguous()),
        qzeros=pack_awq_words(plain.zeros.T.contiguous()),
        scales=scales,
    )


def decode(tensors: AwqGemmTensors, group_size: int, module_name: str) -> PackedWeight:
    """The ROW_MAJOR weight held by a module's tensors; scales keep their dtype.

    Raises CheckpointError naming the tensor when a shape, a dtype, the group count or a value is wrong.
    """
    specs = {
        suffix: TensorSpec(tuple(tensor.shape), tensor.dtype)
        for suffix, tensor in zip(SUFFIXES, (tensors.qweight, tensors.qzeros, tensors.scales), strict=True)
    }
    check_specs(specs, group_size, module_name)
    if not torch.isfinite(tensors.scales).all():
        raise CheckpointError(f"{module_name}.scales holds values that are not finite; download the checkpoint again")
    return pack(
        GroupCodes(
            codes=unpack_awq_words(tensors.qweight).T.contiguous(),
            scales=tensors.scales.T.contiguous(),
            zeros=unpack_awq_words(tensors.qzeros).T.contiguous(),
            bits=BITS,
            group_size=group_size,
        )
    )


def check_specs(specs: dict[str, TensorSpec], group_size: int, module_name: str) -> tuple[int, int]:
    """Check the shapes and dtypes of a module's tensors, keyed by suffix, before any is loaded. Returns (N, K).

    Raises CheckpointError naming the tensor.
    """
    for suffix in SUFFIXES:
        if suffix not in specs:
            raise CheckpointError(f"{module_name}.{suffix} is missing: the module has {', '.join(sorted(specs))}")
    qweight = specs["qweight"]
    if len(qweight.shape) != 2 or qweight.dtype != torch.int32:
        raise _wrong(f"{module_name}.qweight", qweight, "int32 [K, N / 8]")
    num_inputs, num_words = qweight.shape
    if num_inputs % group_size:
        raise CheckpointError(
            f"{module_name}.qweight has K={num_inputs} rows, which group size {group_size} does not divide; "
            "quantization_config.group_size is wrong for this file"
        )
    num_groups, num_outputs = num_inputs // group_size, num_words * AWQ_COLUMNS_PER_WORD
    qzeros, scales = specs["qzeros"], specs["scales"]
    if qzeros.shape != (num_groups, num_words) or qzeros.dtype != torch.int32:
        raise _wrong(f"{module_name}.qzeros", qzeros, f"int32 {[num_groups, num_words]} at group size {group_size}")
    if scales.shape != (num_groups, num_outputs) or scales.dtype not in SCALE_DTYPES:
        expected = f"float16 or bfloat16 {[num_groups, num_outputs]} at group size {group_size}"
        raise _wrong(f"{module_name}.scales", scales, expected)
    return num_outputs, num_inputs


def _wrong(tensor_name: str, spec: TensorSpec, expected: str) -> CheckpointError:
    dtype = str(spec.dtype).removeprefix("torch.")
    return CheckpointError(f"{tensor_name} is {dtype} {list(spec.shape)}; the AWQ gemm format has {expected}")
