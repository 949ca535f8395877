"""The compressed-tensors pack-quantized codec: packed weights to the tensors of the format and back. Knows no file.

weight_packed int32 [N, ceil(K * bits / 32)] packed along K, weight_scale [N, G], weight_shape int64 [N, K], and
weight_zero_point int32 [ceil(N * bits / 32), G] packed along N. Codes and zero points are signed in the format and
stored plus 2**(bits - 1), which are the unsigned ones; without zero points the weight is symmetric, zero 2**(bits - 1).
Source: compressed-tensors src/compressed_tensors/compressors/pack_quantized.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.layout import GroupCodes, PackedWeight, pack, pack_words, unpack, unpack_words
from quant.checkpoint.meta import QuantizationMeta
from quant.checkpoint.stored_module import (
    SCALE_DTYPES,
    WORD_BITS,
    PackedSpec,
    StoredModule,
    bits_of,
    check_group_index,
    check_scales,
    group_size_of,
)
from quant.errors import CheckpointError, QuantizationError

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
SHAPE = "weight_shape"
GROUP_INDEX = "weight_g_idx"


def encode(weight: PackedWeight) -> dict[str, Tensor]:
    """A ROW_MAJOR weight as the format's tensors by suffix, zero points always among them; scales keep their dtype.

    Raises QuantizationError when a scale is not finite.
    """
    plain = unpack(weight)
    if not bool(torch.isfinite(plain.scales).all()):
        raise QuantizationError("a scale is not finite")
    return {
        "weight_packed": pack_words(plain.codes, plain.bits),
        "weight_scale": plain.scales.contiguous(),
        "weight_zero_point": pack_words(plain.zeros.T.contiguous(), plain.bits).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def check(module: StoredModule, meta: QuantizationMeta) -> PackedSpec:
    """What the module holds, from its headers, its shape and its group index.

    Raises CheckpointError naming the tensor that is wrong.
    """
    packed = module.require("weight_packed", 2, (torch.int32,), "int32 [N, ceil(K * bits / 32)]")
    num_outputs, num_words = packed.shape
    num_inputs = _stored_inputs(module, num_outputs)
    bits = bits_of(module, "weight_packed", num_inputs, num_words, meta.bits)
    scale = module.require("weight_scale", 2, SCALE_DTYPES, f"a float type, [{num_outputs}, groups]")
    num_groups = scale.shape[1]
    why = f"beside weight_packed {list(packed.shape)}"
    module.require_shape("weight_scale", (num_outputs, num_groups), SCALE_DTYPES, why)
    if "weight_zero_point" in module.specs or meta.symmetric is False:
        zero_words = -(-num_outputs * bits // WORD_BITS)
        module.require_shape("weight_zero_point", (zero_words, num_groups), (torch.int32,), f"at {bits} bits")
    group_size = group_size_of(module.name, num_inputs, num_groups)
    spec = PackedSpec(num_outputs, num_inputs, bits, group_size, scale.dtype)
    check_group_index(module, GROUP_INDEX, spec)
    return spec


def decode(module_name: str, tensors: Mapping[str, Tensor], spec: PackedSpec) -> PackedWeight:
    """The ROW_MAJOR weight of a checked module's tensors; scales keep their dtype.

    Raises CheckpointError when a scale is not finite.
    """
    scales = tensors["weight_scale"]
    check_scales(module_name, "weight_scale", scales)
    if "weight_zero_point" in tensors:
        zeros = unpack_words(tensors["weight_zero_point"].T.contiguous(), spec.bits, spec.num_outputs).T.contiguous()
    else:
        zeros = torch.full(scales.shape, 2 ** (spec.bits - 1), dtype=torch.uint8)
    return pack(
        GroupCodes(
            codes=unpack_words(tensors["weight_packed"], spec.bits, spec.num_inputs),
            scales=scales,
            zeros=zeros,
            bits=spec.bits,
            group_size=spec.group_size,
        )
    )


def _stored_inputs(module: StoredModule, num_outputs: int) -> int:
    """K, which the packed words alone do not tell. Raises CheckpointError when weight_shape is not [N, K]."""
    module.require_shape(SHAPE, (2,), (torch.int64, torch.int32), "for [N, K]")
    stored_outputs, num_inputs = (int(size) for size in module.values[SHAPE])
    if stored_outputs != num_outputs or num_inputs <= 0:
        raise CheckpointError(
            f"{module.name}.{SHAPE} is {[stored_outputs, num_inputs]}, but weight_packed has {num_outputs} rows"
        )
    return num_inputs
