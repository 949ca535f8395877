"""A quantized module as it lies on disk: what its headers say, and errors that name its tensors.

Legend, for all codecs: N = out features, K = in features, G = groups along K (K / group_size).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import PackedWeight
from kernels.weight_kinds import SUPPORTED_BITS, WHOLE_ROW
from quant.checkpoint.tensor_spec import TensorSpec
from quant.errors import CheckpointError

HALF_DTYPES = (torch.float16, torch.bfloat16)
# formats that store scales in the model's dtype
SCALE_DTYPES = (*HALF_DTYPES, torch.float32)
WORD_BITS = 32


@dataclass(frozen=True)
class PackedSpec:
    """What a quantized module holds, known before it is loaded: a weight [N, K] of `bits` a code.

    group_size: inputs a scale; K where each row has one. scale_dtype is the one that is stored.
    """

    num_outputs: int
    num_inputs: int
    bits: int
    group_size: int
    scale_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_outputs, self.num_inputs

    @property
    def num_groups(self) -> int:
        return self.num_inputs // self.group_size

    @property
    def is_whole_row(self) -> bool:
        return self.group_size == self.num_inputs

    @property
    def num_bits(self) -> int:
        """Of codes, scales and zero points, packed without gaps."""
        scale_bits = 8 * self.scale_dtype.itemsize
        return self.num_outputs * (self.num_inputs * self.bits + self.num_groups * (scale_bits + self.bits))


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one module, by suffix (`qweight`). values: the few whose content says how the others are read."""

    name: str
    specs: Mapping[str, TensorSpec]
    values: Mapping[str, Tensor]

    def require(self, suffix: str, num_dimensions: int, dtypes: tuple[torch.dtype, ...], expected: str) -> TensorSpec:
        """The tensor's spec. Raises CheckpointError, naming it and what is expected, when it is absent or otherwise."""
        if suffix not in self.specs:
            present = ", ".join(sorted(self.specs))
            raise CheckpointError(f"{self.name}.{suffix} is missing: the module has {present}")
        spec = self.specs[suffix]
        if len(spec.shape) != num_dimensions or spec.dtype not in dtypes or 0 in spec.shape:
            raise self.wrong(suffix, expected)
        return spec

    def require_shape(self, suffix: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], why: str) -> None:
        """Raises CheckpointError when the tensor is absent, or not of this shape and one of these dtypes."""
        names = " or ".join(_dtype_name(dtype) for dtype in dtypes)
        expected = f"{names} {list(shape)} {why}"
        if self.require(suffix, len(shape), dtypes, expected).shape != shape:
            raise self.wrong(suffix, expected)

    def wrong(self, suffix: str, expected: str) -> CheckpointError:
        spec = self.specs[suffix]
        return CheckpointError(
            f"{self.name}.{suffix} is {_dtype_name(spec.dtype)} {list(spec.shape)}; the format has {expected}"
        )


def spec_of(weight: PackedWeight) -> PackedSpec:
    """What a packed weight will hold once it is stored."""
    return PackedSpec(*weight.shape, weight.bits, weight.group_size, weight.scales.dtype)


def bits_per_weight(specs: Iterable[PackedSpec]) -> float:
    """Over all of these modules: codes, and their shares of scales and zero points."""
    modules = list(specs)
    return sum(spec.num_bits for spec in modules) / sum(spec.num_outputs * spec.num_inputs for spec in modules)


def group_size_of(module_name: str, num_inputs: int, num_groups: int) -> int:
    """K / G. Raises CheckpointError when the groups are not all of one size."""
    if num_inputs % num_groups:
        raise CheckpointError(
            f"{module_name} has {num_groups} groups for {num_inputs} in features, which they do not divide; "
            "groups of unequal size are not read"
        )
    return num_inputs // num_groups


def check_claimed_group_size(module_name: str, spec: PackedSpec, claimed: int | None) -> None:
    """Raises CheckpointError when quantization_config claims one group size for all modules, and it is not this."""
    expected = spec.num_inputs if claimed == WHOLE_ROW else claimed
    if expected is not None and expected != spec.group_size:
        raise CheckpointError(
            f"{module_name} is stored in groups of {spec.group_size}, but quantization_config says {claimed}; "
            "its group_size is wrong for this file"
        )


def bits_of(module: StoredModule, suffix: str, num_codes: int, num_words: int, claimed: int | None) -> int:
    """How many bits a code has, where num_codes of them fill num_words words; the claimed number where it may be so.

    Raises CheckpointError when none that is read fits.
    """
    fitting = [bits for bits in SUPPORTED_BITS if -(-num_codes * bits // WORD_BITS) == num_words]
    if not fitting:
        bits = num_words * WORD_BITS / num_codes
        raise CheckpointError(
            f"{module.name}.{suffix} holds {num_codes} codes in {num_words} words, {bits:.3g} bits a code; "
            f"{', '.join(map(str, SUPPORTED_BITS))} bits are read"
        )
    if claimed in fitting:
        return claimed
    exact = [bits for bits in fitting if num_codes * bits == num_words * WORD_BITS]
    return (exact or fitting)[0]


def check_group_index(module: StoredModule, suffix: str, spec: PackedSpec) -> None:
    """Raises CheckpointError unless the group index, where there is one, is k // group_size: no activation order."""
    index = module.values.get(suffix)
    if index is None:
        return
    ordered = torch.arange(spec.num_inputs, dtype=index.dtype) // spec.group_size
    # some tools leave -1 where they need none
    if index.shape != ordered.shape or not (torch.equal(index, ordered) or bool((index == -1).all())):
        raise CheckpointError(
            f"{module.name}.{suffix} puts inputs into groups out of order (act-order, desc_act), which the kernels do "
            "not read: take a version of the model without it, or quantize the original with `awq-serve quantize`"
        )


def check_scales(module_name: str, suffix: str, scales: Tensor) -> None:
    """Raises CheckpointError when a scale is not finite."""
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{module_name}.{suffix} holds values that are not finite; download the checkpoint again")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
