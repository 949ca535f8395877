"""The stages of one decoder block in their order: search and fold scales, search ranges, round, pack. Runs no data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.layout import GroupCodes, PackedWeight, pack, unpack
from kernels.reference import dequantize
from quant.block_groups import ScaleGroup
from quant.capture import InputStatistics
from quant.clip_search import search_range
from quant.errors import QuantizationError
from quant.rounding import GroupRange, codes_of, full_range, grid_of
from quant.scale_fold import fold
from quant.scale_groups import linear_of
from quant.scale_search import (
    Grouping,
    ScaleChoice,
    SharedInput,
    keep_unscaled,
    relative_loss,
    search_scale,
)


@dataclass(frozen=True)
class BlockPlan:
    """What the model's family and the recipe say about a block."""

    groups: tuple[ScaleGroup, ...]
    grouping: Grouping

    def linear_names(self) -> tuple[str, ...]:
        """All linears of a block that are quantized, each once."""
        return tuple(name for group in self.groups for name in group.linears)

    def observed_names(self) -> tuple[str, ...]:
        """One module per distinct input: where the inputs are observed."""
        return tuple(group.observed for group in self.groups)


@dataclass(frozen=True)
class FoldedGroup:
    """What the search chose for a group, and the scale that now multiplies its linears, float32 [K]."""

    choice: ScaleChoice
    scale: Tensor


@dataclass(frozen=True)
class LayerResult:
    """A quantized linear: its packed weight, the formula of its scale, and its relative output error."""

    packed: PackedWeight
    formula: str
    loss: float


def fold_scales(block: nn.Module, plan: BlockPlan, statistics: Mapping[str, InputStatistics]) -> dict[str, FoldedGroup]:
    """Search every group's scale and fold it, in place; the block computes what it did. By observed module's name.

    From the last group to the first: a fold then changes only a source that is still to be searched.
    """
    folded = {}
    for group in reversed(plan.groups):
        weights = [linear_of(block, name).weight.detach() for name in group.linears]
        shared = SharedInput(weights, statistics[group.observed], group.spread)
        choose = keep_unscaled if group.source is None else search_scale
        choice = choose(shared, plan.grouping)
        folded[group.observed] = FoldedGroup(choice, fold(block, group, choice.candidate.scale))
    return folded


def round_folded(
    block: nn.Module,
    plan: BlockPlan,
    statistics: Mapping[str, InputStatistics],
    folded: Mapping[str, FoldedGroup],
) -> dict[str, LayerResult]:
    """Search the ranges of every folded linear and round it, in place, by linear name."""
    results = {}
    for group in plan.groups:
        choice, scale = folded[group.observed].choice, folded[group.observed].scale
        gram = statistics[group.observed].gram / (scale[:, None] * scale[None, :])
        for name, signal in zip(group.linears, choice.signals, strict=True):
            weight = linear_of(block, name).weight.detach().clone()
            packed = _round(block, name, search_range(weight, gram, plan.grouping), plan.grouping)
            results[name] = LayerResult(
                packed=packed,
                formula=choice.candidate.name,
                loss=relative_loss(weight - dequantize(packed), gram, signal),
            )
    return results


def round_block_plainly(block: nn.Module, plan: BlockPlan) -> dict[str, PackedWeight]:
    """Round every linear to nearest over the full range of its groups, in place: the RTN method, by linear name."""
    packed = {}
    for name in plan.linear_names():
        widest = full_range(linear_of(block, name).weight.detach(), plan.grouping.group_size)
        packed[name] = _round(block, name, widest, plan.grouping)
    return packed


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises QuantizationError naming the tensor when it holds a NaN or an infinity."""
    if not bool(torch.isfinite(tensor).all()):
        num_bad = int((~torch.isfinite(tensor)).sum())
        raise QuantizationError(f"{name} has {num_bad} values that are not finite; it cannot be quantized")


def _round(block: nn.Module, name: str, group_range: GroupRange, grouping: Grouping) -> PackedWeight:
    weight = linear_of(block, name).weight
    grid = grid_of(group_range, grouping.bits)
    check_finite(f"the scale of {name}", grid.scales)
    codes = codes_of(weight.detach(), grid, grouping.bits)
    packed = pack(codes)
    _check_round_trip(name, codes, packed)
    with torch.no_grad():
        weight.copy_(dequantize(packed))
    return packed


def _check_round_trip(name: str, codes: GroupCodes, packed: PackedWeight) -> None:
    if not torch.equal(unpack(packed).codes, codes.codes):
        raise QuantizationError(f"the codes of {name} do not come back from packing as they went in")
