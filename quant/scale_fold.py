"""Folds input scales into the operation before: it divides, the linears multiply, the function stays the same.

Legend: C = channels of the operation that feeds, K = in features of the linears it feeds.
"""

import torch
from torch import Tensor, nn

from quant.scale_groups import ScaleGroup, linear_of
from quant.scale_search import ChannelSpread

# norms are stored in this dtype, so consumers are multiplied by what the division gives after rounding to it
STORAGE_DTYPE = torch.float16


def spread_of(block: nn.Module, group: ScaleGroup, head_width: int) -> ChannelSpread | None:
    """How the group's source reaches its linears; None when the shapes do not say, and the group cannot be folded."""
    num_channels = source_weight(block, group).shape[0]
    num_inputs = linear_of(block, group.linears[0]).in_features
    if num_inputs == num_channels:
        return ChannelSpread(width=num_channels, repeats=1)
    if num_inputs % num_channels or num_channels % head_width:
        return None
    return ChannelSpread(width=head_width, repeats=num_inputs // num_channels)


def source_weight(block: nn.Module, group: ScaleGroup) -> nn.Parameter:
    """The weight of the operation that feeds the group: a norm's [C] or a linear's [C, K]."""
    return block.get_submodule(group.source).get_parameter("weight")


def fold(block: nn.Module, group: ScaleGroup, scale: Tensor, spread: ChannelSpread) -> Tensor:
    """Divide the source by scale [C] and multiply the group's linears. Returns the scale that was applied, [K].

    A norm's quotient is rounded to STORAGE_DTYPE first and the scale recomputed from it, so that rounding the norm
    costs nothing. A linear's rows are divided exactly: they are quantized later.
    """
    weight = source_weight(block, group)
    with torch.no_grad():
        if weight.dim() == 1:
            quotient = (weight / scale).to(STORAGE_DTYPE).float()
            # a channel whose norm weight is 0, or leaves what STORAGE_DTYPE can hold, keeps the weight it has
            kept = (quotient == 0) | ~torch.isfinite(quotient)
            effective = torch.where(kept, torch.ones_like(scale), weight / quotient)
            weight.copy_(torch.where(kept, weight, quotient))
        else:
            effective = scale
            weight.div_(scale[:, None])
            bias = linear_of(block, group.source).bias
            if bias is not None:
                bias.div_(scale)
        expanded = spread.expand(effective)
        for name in group.linears:
            linear_of(block, name).weight.mul_(expanded)
    return expanded
