"""The families of kernels: every (kernel, architecture, tile, dtype, group) that the server may launch is in one."""

from kernels import attention_variants, fused_variants, linear_variants, lora_variants, sampling_variants
from kernels.variant import Family, Variant

FAMILIES: tuple[Family, ...] = (
    linear_variants.FAMILY,
    attention_variants.FAMILY,
    fused_variants.FAMILY,
    lora_variants.FAMILY,
    sampling_variants.FAMILY,
)
KERNELS = {name: kernel for family in FAMILIES for name, kernel in family.kernels.items()}


def family_of(variant: Variant) -> Family:
    """The family whose kernel the variant is."""
    return next(family for family in FAMILIES if variant.kernel in family.kernels)


def all_variants(arch: int) -> list[Variant]:
    """Everything for one architecture."""
    return [variant for family in FAMILIES for variant in family.all_variants(arch)]


def sample_variants(arch: int) -> list[Variant]:
    """What the tests compile: every kernel and every tile once."""
    return [variant for family in FAMILIES for variant in family.sample_variants(arch)]
