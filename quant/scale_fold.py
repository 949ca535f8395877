"""Folds input scales into the operation before: it divides, the linears multiply, the function stays the same.

Legend: C = channels of the operation that feeds, N = its out features, K = in features of the linears it feeds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.block_groups import ScaleGroup, ScaleSource

# norms are stored in this dtype, so consumers are multiplied by what the division gives after rounding to it
STORAGE_DTYPE = torch.float16


@dataclass(frozen=True)
class Fold:
    """What a group's linears were multiplied by, [K], and what its source's rows were divided by, [N].

    divisor: None where the source is no linear.
    """

    scale: Tensor
    divisor: Tensor | None


def fold(block: nn.Module, group: ScaleGroup, scale: Tensor) -> Fold:
    """Divide the group's source by scale [C] and multiply all that reads it. Returns what was applied.

    A norm's quotient is rounded to STORAGE_DTYPE first and the scale recomputed from it, so that rounding the norm
    costs nothing. A linear's rows are divided exactly: they are quantized later. Without a source nothing changes.
    """
    if group.source is None:
        weight = block.get_submodule(group.linears[0]).get_parameter("weight")
        return Fold(weight.new_ones(group.spread.width * group.spread.repeats), None)
    source = block.get_submodule(group.source.name)
    is_norm = source.get_parameter("weight").dim() == 1
    with torch.no_grad():
        effective = _divide_norm(source, group.source, scale) if is_norm else scale
        divisor = None if is_norm else _divide_rows(source, group.source, scale)
        expanded = group.spread.expand(effective)
        for name in (*group.linears, *group.kept):
            block.get_submodule(name).get_parameter("weight").mul_(expanded)
    return Fold(expanded, divisor)


def _divide_norm(norm: nn.Module, source: ScaleSource, scale: Tensor) -> Tensor:
    weight, offset = norm.get_parameter("weight"), source.norm_offset
    quotient = ((weight + offset) / scale - offset).to(STORAGE_DTYPE).float()
    # a channel that the norm switches off, or that leaves what STORAGE_DTYPE can hold, keeps the weight it has
    kept = (quotient + offset == 0) | ~torch.isfinite(quotient)
    effective = torch.where(kept, torch.ones_like(scale), (weight + offset) / (quotient + offset))
    weight.copy_(torch.where(kept, weight, quotient))
    bias = _bias_of(norm)
    if bias is not None:
        bias.div_(effective)
    return effective


def _divide_rows(linear: nn.Module, source: ScaleSource, scale: Tensor) -> Tensor:
    weight, bias = linear.get_parameter("weight"), _bias_of(linear)
    divisor = torch.ones_like(weight[:, 0])
    divisor.view(-1, source.period)[:, -source.run :] = scale.view(-1, source.run)
    weight.div_(divisor[:, None])
    if bias is not None:
        bias.div_(divisor)
    return divisor


def _bias_of(module: nn.Module) -> Tensor | None:
    bias: Tensor | None = getattr(module, "bias", None)
    return bias
