"""The GPTQ layouts v1 and v2, read only. Pure: knows no file.

qweight int32 [K * bits / 32, N] packed along K, qzeros int32 [G, N * bits / 32] packed along N, scales [G, N], g_idx
int32 [K]. v1 stores the zero point minus 1, v2 stores it. Source: GPTQModel gptqmodel/nn_modules/qlinear and
gptqmodel/utils/model.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.layout import GroupCodes, PackedWeight, pack, pack_words, unpack_words
from quant.checkpoint.meta import QuantizationMeta
from quant.checkpoint.stored_module import (
    SCALE_DTYPES,
    WORD_BITS,
    PackedSpec,
    StoredModule,
    bits_of,
    check_claimed_group_size,
    check_group_index,
    check_scales,
    group_size_of,
)

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
GROUP_INDEX = "g_idx"


def check(module: StoredModule, meta: QuantizationMeta) -> PackedSpec:
    """What the module holds, from its headers and its group index. Raises CheckpointError naming what is wrong."""
    qweight = module.require("qweight", 2, (torch.int32,), "int32 [K * bits / 32, N]")
    num_words, num_outputs = qweight.shape
    scales = module.require("scales", 2, SCALE_DTYPES, f"a float type, [groups, {num_outputs}]")
    num_groups = scales.shape[0]
    module.require_shape("scales", (num_groups, num_outputs), SCALE_DTYPES, f"beside qweight {list(qweight.shape)}")
    zero_words = module.require("qzeros", 2, (torch.int32,), f"int32 [{num_groups}, N * bits / 32]").shape[1]
    bits = bits_of(module, "qzeros", num_outputs, zero_words, meta.bits)
    module.require_shape("qzeros", (num_groups, zero_words), (torch.int32,), f"beside scales {list(scales.shape)}")
    num_inputs, remainder = divmod(num_words * WORD_BITS, bits)
    if remainder:
        raise module.wrong("qweight", f"whole runs of {bits} words along K at {bits} bits")
    group_size = group_size_of(module.name, num_inputs, num_groups)
    spec = PackedSpec(num_outputs, num_inputs, bits, group_size, scales.dtype)
    check_claimed_group_size(module.name, spec, meta.group_size)
    check_group_index(module, GROUP_INDEX, spec)
    return spec


def decode_v1(module_name: str, tensors: Mapping[str, Tensor], spec: PackedSpec) -> PackedWeight:
    """The ROW_MAJOR weight of a checked v1 module's tensors. Raises CheckpointError when a scale is not finite."""
    words = tensors["qzeros"]
    if spec.bits == 3:
        stored = unpack_words(words, spec.bits, spec.num_outputs)
        zeros = (stored + 1) % 2**spec.bits
    else:
        # v1 is written by subtracting 1 from every field of a word at once, so a zero point of 0 borrows from the next
        # field; adding to whole words gives the borrow back
        ones = pack_words(torch.ones(1, spec.num_outputs, dtype=torch.uint8), spec.bits)
        zeros = unpack_words(words + ones, spec.bits, spec.num_outputs)
    return _decode(module_name, tensors, zeros, spec)


def decode_v2(module_name: str, tensors: Mapping[str, Tensor], spec: PackedSpec) -> PackedWeight:
    """The ROW_MAJOR weight of a checked v2 module's tensors. Raises CheckpointError when a scale is not finite."""
    return _decode(module_name, tensors, unpack_words(tensors["qzeros"], spec.bits, spec.num_outputs), spec)


def _decode(module_name: str, tensors: Mapping[str, Tensor], zeros: Tensor, spec: PackedSpec) -> PackedWeight:
    """zeros: uint8 [G, N]."""
    check_scales(module_name, "scales", tensors["scales"])
    return pack(
        GroupCodes(
            codes=unpack_words(tensors["qweight"].T.contiguous(), spec.bits, spec.num_inputs),
            scales=tensors["scales"].T.contiguous(),
            zeros=zeros.T.contiguous(),
            bits=spec.bits,
            group_size=spec.group_size,
        )
    )
