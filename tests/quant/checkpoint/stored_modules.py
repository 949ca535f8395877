"""Random packed weights, and modules read by a codec as the reader does it: checked by their headers, then decoded."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.layout import GroupCodes, PackedWeight, pack
from quant.checkpoint.codecs import CODECS
from quant.checkpoint.meta import CheckpointFormat, QuantizationMeta
from quant.checkpoint.stored_module import PackedSpec, StoredModule
from quant.checkpoint.tensor_spec import TensorSpec


def random_weight(
    num_outputs: int,
    num_inputs: int,
    group_size: int,
    seed: int = 0,
    *,
    bits: int = 4,
    scale_dtype: torch.dtype = torch.float16,
) -> PackedWeight:
    """Every code and every zero point that the bits allow, scales that the dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    groups = (num_outputs, num_inputs // group_size)
    return pack(
        GroupCodes(
            codes=torch.randint(0, 2**bits, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8),
            scales=(torch.rand(groups, generator=generator) + 0.01).to(scale_dtype),
            zeros=torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8),
            bits=bits,
            group_size=group_size,
        )
    )


def meta_of(
    stored_as: CheckpointFormat,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    may_be_scaled: bool = True,
) -> QuantizationMeta:
    return QuantizationMeta(stored_as, bits, group_size, symmetric, may_be_scaled)


def check_tensors(tensors: Mapping[str, Tensor], meta: QuantizationMeta) -> PackedSpec:
    """What the codec says of a module called `layer` with these tensors by suffix."""
    codec = CODECS[meta.format]
    specs = {suffix: TensorSpec(tuple(tensor.shape), tensor.dtype) for suffix, tensor in tensors.items()}
    values = {suffix: tensors[suffix] for suffix in codec.value_suffixes if suffix in tensors}
    return codec.check(StoredModule("layer", specs, values), meta)


def read_tensors(tensors: Mapping[str, Tensor], meta: QuantizationMeta) -> PackedWeight:
    """The weight of a module called `layer` with these tensors by suffix."""
    return CODECS[meta.format].decode("layer", tensors, check_tensors(tensors, meta))


def assert_same_weight(read: PackedWeight, expected: PackedWeight) -> None:
    """Codes, zero points and scales to the bit, and what they mean."""
    assert (read.shape, read.bits, read.group_size) == (expected.shape, expected.bits, expected.group_size)
    assert torch.equal(read.codes, expected.codes)
    assert torch.equal(read.zeros, expected.zeros)
    assert read.scales.dtype == expected.scales.dtype
    assert torch.equal(read.scales, expected.scales)


def awq_config(group_size: int, kept: tuple[str, ...] = ()) -> dict[str, object]:
    """The quantization_config of an AWQ gemm checkpoint, as other tools write it."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(kept),
    }
