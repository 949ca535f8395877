"""The AWQ gemm codec: packed weights to the tensors of the format and back. Pure: knows no file.

The format stores the transpose of the linear's weight: qweight int32 [K, N / 8], qzeros int32 [G, N / 8] (the true zero
point), scales float16 or bfloat16 [G, N]. Source: AutoAWQ awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from collections.abc import Mapping

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
from quant.checkpoint.meta import QuantizationMeta
from quant.checkpoint.stored_module import (
    HALF_DTYPES,
    PackedSpec,
    StoredModule,
    check_claimed_group_size,
    check_scales,
    group_size_of,
)
from quant.errors import QuantizationError

BITS = 4
SUFFIXES = ("qweight", "qzeros", "scales")


def encode(weight: PackedWeight) -> dict[str, Tensor]:
    """A ROW_MAJOR 4-bit weight as the format's tensors by suffix, scales in float16.

    Raises ValueError for other bits or an N that is no multiple of 8, QuantizationError when float16 changes a scale.
    """
    plain = unpack(weight)
    if plain.bits != BITS:
        raise ValueError(f"the AWQ gemm format holds 4-bit codes, not {plain.bits}-bit ones")
    scales = plain.scales.T.to(torch.float16).contiguous()
    if not bool(torch.isfinite(scales).all()) or not torch.equal(scales.float(), plain.scales.T.float()):
        smallest, largest = (float(x) for x in plain.scales.float().abs().aminmax())
        raise QuantizationError(
            f"scales from {smallest:.3g} to {largest:.3g} do not fit float16 exactly, as the AWQ gemm format asks for"
        )
    return {
        "qweight": pack_awq_words(plain.codes.T.contiguous()),
        "qzeros": pack_awq_words(plain.zeros.T.contiguous()),
        "scales": scales,
    }


def check(module: StoredModule, meta: QuantizationMeta) -> PackedSpec:
    """What the module holds, from its headers. Raises CheckpointError naming the tensor that is wrong."""
    qweight = module.require("qweight", 2, (torch.int32,), "int32 [K, N / 8]")
    num_inputs, num_words = qweight.shape
    num_outputs = num_words * AWQ_COLUMNS_PER_WORD
    scales = module.require("scales", 2, HALF_DTYPES, f"float16 or bfloat16 [groups, {num_outputs}]")
    num_groups = scales.shape[0]
    module.require_shape("scales", (num_groups, num_outputs), HALF_DTYPES, f"beside qweight {list(qweight.shape)}")
    module.require_shape("qzeros", (num_groups, num_words), (torch.int32,), f"beside scales {list(scales.shape)}")
    group_size = group_size_of(module.name, num_inputs, num_groups)
    spec = PackedSpec(num_outputs, num_inputs, BITS, group_size, scales.dtype)
    check_claimed_group_size(module.name, spec, meta.group_size)
    return spec


def decode(module_name: str, tensors: Mapping[str, Tensor], spec: PackedSpec) -> PackedWeight:
    """The ROW_MAJOR weight of a checked module's tensors; scales keep their dtype.

    Raises CheckpointError when a scale is not finite.
    """
    check_scales(module_name, "scales", tensors["scales"])
    return pack(
        GroupCodes(
            codes=unpack_awq_words(tensors["qweight"]).T.contiguous(),
            scales=tensors["scales"].T.contiguous(),
            zeros=unpack_awq_words(tensors["qzeros"]).T.contiguous(),
            bits=spec.bits,
            group_size=spec.group_size,
        )
    )
