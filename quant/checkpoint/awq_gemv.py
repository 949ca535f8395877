"""AutoAWQ's gemv and gemv_fast layouts, read only. Pure: knows no file.

gemv: qweight int32 [N, K / 8] in natural order, qzeros int32 [N, Z], scales [N, 8 Z], padded with zeros beyond G, where
Z = G / 8 rounded up to `padded_words`. gemv_fast: qweight int16 [N / 4, K] in tiles, scales and qzeros [8 Z, N], the
latter holding -zero * scale as floats. Sources: AutoAWQ awq/modules/linear/gemv.py and gemv_fast.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.layout import (
    GEMV_FAST_INPUTS,
    GEMV_FAST_ROWS,
    GroupCodes,
    PackedWeight,
    pack,
    unpack_gemv_fast_words,
    unpack_words,
)
from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint.meta import QuantizationMeta
from quant.checkpoint.stored_module import HALF_DTYPES, PackedSpec, StoredModule, check_scales
from quant.errors import CheckpointError

BITS = 4
CODES_PER_WORD = 8
SUFFIXES = ("qweight", "qzeros", "scales")
# the width of the zeros is rounded up to so many words, by the smallest group size that asks for it
PADDED_WORDS = ((128, 1), (64, 2), (32, 4))
# a zero point times a float16 scale is off by less than 0.01 of the scale: more means other contents
MAX_ZERO_ERROR = 0.05


def padded_words(num_groups: int, group_size: int) -> int:
    """Z: words of zero points a row. Source: AutoAWQ awq/modules/linear/gemv.py, calculate_zeros_width."""
    multiple = next((words for smallest, words in PADDED_WORDS if group_size >= smallest), PADDED_WORDS[-1][1])
    num_words = -(-num_groups // CODES_PER_WORD)
    return -(-num_words // multiple) * multiple


def check_gemv(module: StoredModule, meta: QuantizationMeta) -> PackedSpec:
    """What a gemv module holds, from its headers. Raises CheckpointError naming the tensor that is wrong."""
    qweight = module.require("qweight", 2, (torch.int32,), "int32 [N, K / 8]")
    num_outputs, num_inputs = qweight.shape[0], qweight.shape[1] * CODES_PER_WORD
    spec = _claimed_spec(module, meta, num_outputs, num_inputs)
    num_words = padded_words(spec.num_groups, spec.group_size)
    why = f"at group size {spec.group_size}"
    module.require_shape("qzeros", (num_outputs, num_words), (torch.int32,), why)
    module.require_shape("scales", (num_outputs, num_words * CODES_PER_WORD), HALF_DTYPES, why)
    return spec


def check_gemv_fast(module: StoredModule, meta: QuantizationMeta) -> PackedSpec:
    """What a gemv_fast module holds, from its headers. Raises CheckpointError naming the tensor that is wrong."""
    qweight = module.require("qweight", 2, (torch.int16,), "int16 [N / 4, K]")
    num_outputs, num_inputs = qweight.shape[0] * GEMV_FAST_ROWS, qweight.shape[1]
    if num_inputs % GEMV_FAST_INPUTS:
        raise module.wrong("qweight", f"int16 [N / 4, K] with K a multiple of {GEMV_FAST_INPUTS}")
    spec = _claimed_spec(module, meta, num_outputs, num_inputs)
    shape = (padded_words(spec.num_groups, spec.group_size) * CODES_PER_WORD, num_outputs)
    for suffix in ("qzeros", "scales"):
        module.require_shape(suffix, shape, HALF_DTYPES, f"at group size {spec.group_size}")
    return spec


def decode_gemv(module_name: str, tensors: Mapping[str, Tensor], spec: PackedSpec) -> PackedWeight:
    """The ROW_MAJOR weight of a checked gemv module's tensors. Raises CheckpointError when a scale is not finite."""
    scales = tensors["scales"][:, : spec.num_groups].contiguous()
    check_scales(module_name, "scales", scales)
    return pack(
        GroupCodes(
            codes=unpack_words(tensors["qweight"], BITS, spec.num_inputs),
            scales=scales,
            zeros=unpack_words(tensors["qzeros"], BITS, spec.num_groups),
            bits=BITS,
            group_size=spec.group_size,
        )
    )


def decode_gemv_fast(module_name: str, tensors: Mapping[str, Tensor], spec: PackedSpec) -> PackedWeight:
    """The ROW_MAJOR weight of a checked gemv_fast module's tensors.

    Raises CheckpointError when a scale is not finite, or a zero point is no integer from 0 to 15.
    """
    scales, products = (tensors[suffix][: spec.num_groups].T.contiguous() for suffix in ("scales", "qzeros"))
    check_scales(module_name, "scales", scales)
    # where the scale is 0 the zero point does not matter
    quotients = torch.where(scales == 0, 0.0, -products.float() / scales.float())
    zeros = quotients.round()
    is_integer = (quotients - zeros).abs() <= MAX_ZERO_ERROR
    if not bool((is_integer & (zeros >= 0) & (zeros < 2**BITS)).all()):
        raise CheckpointError(f"{module_name}.qzeros is not -zero * scale for zero points from 0 to 15")
    return pack(
        GroupCodes(
            codes=unpack_gemv_fast_words(tensors["qweight"]),
            scales=scales,
            zeros=zeros.to(torch.uint8),
            bits=BITS,
            group_size=spec.group_size,
        )
    )


def _claimed_spec(module: StoredModule, meta: QuantizationMeta, num_outputs: int, num_inputs: int) -> PackedSpec:
    """The group size comes from the config, as the tensors are padded. Raises CheckpointError if it divides not."""
    scales = module.require("scales", 2, HALF_DTYPES, "float16 or bfloat16, two-dimensional")
    group_size = num_inputs if meta.group_size in (WHOLE_ROW, None) else meta.group_size
    if group_size is None or num_inputs % group_size:
        raise CheckpointError(
            f"{module.name}.qweight has K={num_inputs}, which group size {group_size} does not divide; "
            "quantization_config.group_size is wrong for this file"
        )
    return PackedSpec(num_outputs, num_inputs, BITS, group_size, scales.dtype)
