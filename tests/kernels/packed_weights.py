"""Random packed weights for the tests of the kernels and the model."""

import torch

from kernels.layout import GroupCodes, PackedWeight, pack


def random_packed_weight(
    num_outputs: int, num_inputs: int, group_size: int, *, bits: int = 4, seed: int = 0
) -> PackedWeight:
    """A ROW_MAJOR weight with every code and zero point that the bits allow, and scales that float16 holds."""
    generator = torch.Generator().manual_seed(seed)
    groups = (num_outputs, num_inputs // group_size)
    return pack(
        GroupCodes(
            codes=torch.randint(0, 2**bits, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8),
            scales=(torch.rand(groups, generator=generator) * 0.02 + 0.001).to(torch.float16),
            zeros=torch.randint(0, 2**bits, groups, generator=generator, dtype=torch.uint8),
            bits=bits,
            group_size=group_size,
        )
    )
