"""What is done with a block's linears: search and fold scales, correct, search ranges, round. Runs no data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kernels.layout import GroupCodes, PackedWeight, pack, unpack
from kernels.reference import dequantize
from quant.block_groups import ScaleGroup
from quant.capture import Child
from quant.checkpoint.folded_scales import ModuleScales
from quant.clip_search import search_range
from quant.correction import correct_
from quant.error_feedback import FeedbackFactor, round_with_feedback
from quant.errors import QuantizationError
from quant.input_statistics import InputStatistics, PairStatistics
from quant.machine_memory import give_back_freed
from quant.method import MethodSteps
from quant.residual import StreamWriter
from quant.rounding import GroupGrid, codes_of, full_range, grid_of, round_onto, round_plainly
from quant.row_spans import row_spans
from quant.salience import LinearChannels, channel_errors, describe_channels
from quant.scale_fold import STORAGE_DTYPE, fold
from quant.scale_groups import linear_of
from quant.scale_search import (
    IDENTITY,
    SMALLEST_SIGNAL,
    Grouping,
    ScaleCandidate,
    ScaleChoice,
    SharedInput,
    keep_unscaled,
    output_error,
    search_scale,
)


@dataclass(frozen=True)
class BlockPlan:
    """What the model's family and the recipe say about a block.

    grouping: that of all its linears, but for those that `mixture` names; linears of a group have the same one.
    writers: those that add to the residual stream, as far as that is known; the correction uses it. order: the block's
    children in the order in which they run, up to one that runs twice; what it holds need not be run again and again.
    """

    groups: tuple[ScaleGroup, ...]
    grouping: Grouping
    steps: MethodSteps
    mixture: Mapping[str, Grouping] = field(default_factory=dict)
    writers: Mapping[str, StreamWriter] = field(default_factory=dict)
    order: tuple[Child, ...] = ()

    def grouping_of(self, linear: str) -> Grouping:
        """How the linear of that name in the block is rounded."""
        return self.mixture.get(linear, self.grouping)

    def linear_names(self) -> tuple[str, ...]:
        """All linears of a block that are quantized, each once."""
        return tuple(name for group in self.groups for name in group.linears)


@dataclass(frozen=True)
class FoldedGroup:
    """What the search chose for a group, and the scale that now multiplies its linears, float32 [K].

    divisor: of the group's source, where that is a linear: what its rows have been divided by, float32 [N].
    """

    choice: ScaleChoice
    scale: Tensor
    divisor: Tensor | None = None


@dataclass(frozen=True)
class LayerResult:
    """A quantized linear: its packed weight, the formula of its scale, its relative output error, plain and now.

    channel_errors: float32 [K], each input channel's part of the error now (salience.channel_errors). All of it
    is measured on the outputs as they were before scales were folded into the linear's rows.
    """

    packed: PackedWeight
    formula: str
    plain_loss: float
    loss: float
    channel_errors: Tensor


def describe_linears(
    block: nn.Module, groups: Sequence[ScaleGroup], plan: BlockPlan, statistics: Mapping[str, InputStatistics]
) -> dict[str, LinearChannels]:
    """The input channels of the groups' linears before any scale is folded, by linear name; changes nothing."""
    channels = {}
    for group in groups:
        known = statistics[group.observed]
        for name in group.linears:
            weight, grouping = linear_of(block, name).weight.detach(), plan.grouping_of(name)
            lost = (rows - round_plainly(rows, grouping.group_size, grouping.bits) for rows in row_spans(weight))
            channels[name] = describe_channels(weight, lost, known.gram, known.mean_magnitude)
    return channels


def choose_scales(
    block: nn.Module, groups: Sequence[ScaleGroup], plan: BlockPlan, statistics: Mapping[str, InputStatistics]
) -> dict[str, ScaleChoice]:
    """The scale of every group that the method and the group allow to scale, by observed module; changes nothing."""
    choices = {}
    for group in groups:
        weights = [linear_of(block, name).weight.detach() for name in group.linears]
        shared = SharedInput(weights, statistics[group.observed], group.spread)
        choose = search_scale if plan.steps.scales and group.source is not None else keep_unscaled
        choices[group.observed] = choose(shared, plan.grouping_of(group.linears[0]))
    return choices


def fold_scales(
    block: nn.Module, groups: Sequence[ScaleGroup], choices: Mapping[str, ScaleChoice]
) -> dict[str, FoldedGroup]:
    """Fold the chosen scales, in place; the block computes what it did.

    From the last group to the first: a group's source may be a linear of an earlier one.
    """
    folded = {}
    for group in reversed(groups):
        choice = choices[group.observed]
        applied = fold(block, group, choice.candidate.scale)
        folded[group.observed] = FoldedGroup(choice, applied.scale, applied.divisor)
    return folded


def keep_scales(
    block: nn.Module, groups: Sequence[ScaleGroup], choices: Mapping[str, ScaleChoice]
) -> dict[str, FoldedGroup]:
    """The groups as they are with nothing folded, whatever was chosen, by observed module."""
    folded = {}
    for group in groups:
        first = linear_of(block, group.linears[0])
        ones = first.weight.new_ones(first.in_features)
        identity = replace(choices[group.observed], candidate=ScaleCandidate(IDENTITY, ones))
        folded[group.observed] = FoldedGroup(identity, ones)
    return folded


def folded_scales(groups: Sequence[ScaleGroup], folded: Mapping[str, FoldedGroup]) -> dict[str, ModuleScales]:
    """What folding the groups has done to the linears that it has changed, by their names in the block."""
    inputs: dict[str, Tensor] = {}
    divisors: dict[str, Tensor] = {}
    for group in groups:
        own = folded[group.observed]
        if bool((own.scale != 1).any()):
            inputs |= dict.fromkeys(group.linears, own.scale)
        if group.source is not None and own.divisor is not None and bool((own.divisor != 1).any()):
            divisors[group.source.name] = own.divisor
    return {name: ModuleScales(inputs.get(name), divisors.get(name)) for name in {**inputs, **divisors}}


def round_folded(
    block: nn.Module,
    groups: Sequence[ScaleGroup],
    plan: BlockPlan,
    statistics: PairStatistics,
    folded: Mapping[str, FoldedGroup],
) -> dict[str, LayerResult]:
    """Correct every linear of the groups, search its ranges and round it, in place, by linear name.

    What the statistics say of the groups is taken from them: it is worked on in its own memory.
    """
    results = {}
    for group in groups:
        choice, scale = folded[group.observed].choice, folded[group.observed].scale
        weights = {name: linear_of(block, name).weight.detach().div_(scale) for name in group.linears}
        # in the outputs' own size, as the signal is: a scale folded into the linear's rows had divided them
        divisors = [_row_divisors(*pair) for pair in zip(choice.row_norms, weights.values(), strict=True)]
        gram = _correct(weights, statistics, group.observed).div_(scale[:, None]).div_(scale)
        give_back_freed(gram.nbytes)
        for weight in weights.values():
            weight.mul_(scale)
        grouping = plan.grouping_of(group.linears[0])
        codes = find_codes(list(weights.values()), gram, plan.steps, grouping)
        numbers = zip(group.linears, codes, choice.signals, divisors, choice.plain_losses, strict=True)
        for name, own_codes, signal, row_divisors, plain_loss in numbers:
            packed = pack_codes(name, own_codes)
            rounded = dequantize(packed)
            lost = weights[name].sub_(rounded).mul_(row_divisors[:, None])
            errors = channel_errors(row_spans(lost), gram)
            weights[name].copy_(rounded)
            loss = float(errors.sum()) / max(signal, SMALLEST_SIGNAL)
            results[name] = LayerResult(packed, choice.candidate.name, plain_loss, loss, errors)
    return results


def _correct(weights: Mapping[str, Tensor], statistics: PairStatistics, observed: str) -> Tensor:
    """Correct the weights by name, in place, as far as anything is known to correct them with; their input's gram."""
    known = statistics.take(observed)
    if isinstance(known, InputStatistics):
        return known.gram
    return correct_(weights, known.moments).div_(known.num_tokens)


def _row_divisors(row_norms: Tensor, weight: Tensor) -> Tensor:
    """[N]: what the rows of weight [N, K], whose norms were row_norms, have been divided by; 1 for rows of zeros."""
    norms = weight.norm(dim=1)
    return torch.where(norms > 0, row_norms / norms, 1.0)


def round_block_plainly(block: nn.Module, plan: BlockPlan) -> dict[str, PackedWeight]:
    """Round every linear to nearest over the full range of its groups, in place: the RTN method, by linear name."""
    packed = {}
    for name in plan.linear_names():
        packed[name] = round_linear_plainly(block, name, plan.grouping_of(name))
    return packed


def round_linear_plainly(module: nn.Module, name: str, grouping: Grouping) -> PackedWeight:
    """Round the linear of that name in the module to nearest over the full range of its groups, in place."""
    return store(module, name, plain_codes(linear_of(module, name).weight.detach(), grouping))


def plain_codes(weight: Tensor, grouping: Grouping) -> GroupCodes:
    """The codes of weight [N, K] rounded to nearest over the full range of its groups."""
    grid = grid_of(full_range(weight, grouping.group_size), grouping.bits)
    return codes_of(weight, grid, grouping.bits)


def find_codes(weights: Sequence[Tensor], gram: Tensor, steps: MethodSteps, grouping: Grouping) -> list[GroupCodes]:
    """The codes of weights [N, K] that read one input of gram [K, K], by the method's steps.

    No row's loss, its part of tr(D G D^T), is above that of rounding it to nearest.
    """
    # rows do not depend on each other: what is worked out of the gram serves those of all weights
    feedback = FeedbackFactor.of(gram) if steps.feedback else None

    def codes_of_rows(rows: Tensor, grid: GroupGrid) -> GroupCodes:
        rounded = round_onto(rows, grid, grouping.bits)
        if feedback is not None:
            candidate = round_with_feedback(rows, feedback, grid, grouping.bits)
            better = output_error(rows - candidate, gram) < output_error(rows - rounded, gram)
            rounded = torch.where(better[:, None], candidate, rounded)
        return codes_of(rounded, grid, grouping.bits)

    def codes_of_weight(weight: Tensor) -> GroupCodes:
        # ranges of all rows at once: they are searched few at a time, on all cores
        ends = search_range(weight, gram, grouping) if steps.ranges else full_range(weight, grouping.group_size)
        grid = grid_of(ends, grouping.bits)
        rows = list(row_spans(weight))
        sizes = [len(span) for span in rows]
        grids = map(GroupGrid, torch.split(grid.scales, sizes), torch.split(grid.zeros, sizes))
        return _join_rows([codes_of_rows(*pair) for pair in zip(rows, grids, strict=True)])

    return [codes_of_weight(weight) for weight in weights]


def _join_rows(parts: Sequence[GroupCodes]) -> GroupCodes:
    """The codes of one weight, given some rows after the others."""
    codes, scales, zeros = (
        torch.cat(tensors) for tensors in zip(*((part.codes, part.scales, part.zeros) for part in parts), strict=True)
    )
    return replace(parts[0], codes=codes, scales=scales, zeros=zeros)


def store(module: nn.Module, name: str, codes: GroupCodes) -> PackedWeight:
    """Give the linear of that name in the module the weight that the codes stand for; returns it packed.

    Raises QuantizationError when a scale is not finite.
    """
    packed = pack_codes(name, codes)
    linear_of(module, name).weight.copy_(dequantize(packed))
    return packed


def pack_codes(name: str, codes: GroupCodes) -> PackedWeight:
    """The codes of the linear of that name, packed. Raises QuantizationError when a scale is not finite."""
    check_finite(f"the scale of {name}", codes.scales)
    packed = pack(codes)
    if not torch.equal(unpack(packed).codes, codes.codes):
        raise QuantizationError(f"the codes of {name} do not come back from packing as they went in")
    return packed


def plain_parameters(block: nn.Module, plan: BlockPlan) -> dict[str, nn.Parameter]:
    """The parameters of a block that are not quantized (norms, biases, routers), by their names in it."""
    quantized = set(plan.linear_names())
    return {name: own for name, own in block.named_parameters() if name.removesuffix(".weight") not in quantized}


def round_plain_parameters(block: nn.Module, name: str, plan: BlockPlan) -> None:
    """Give those of the block of that name the values that STORAGE_DTYPE holds, in place.

    The next block is to see what will be stored. Raises QuantizationError naming one that does not fit.
    """
    with torch.no_grad():
        for own_name, parameter in plain_parameters(block, plan).items():
            stored = parameter.to(STORAGE_DTYPE)
            check_finite(f"{name}.{own_name} as {STORAGE_DTYPE}", stored)
            parameter.copy_(stored)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises QuantizationError naming the tensor when it holds a NaN or an infinity."""
    if not bool(torch.isfinite(tensor).all()):
        num_bad = int((~torch.isfinite(tensor)).sum())
        raise QuantizationError(f"{name} has {num_bad} values that are not finite; it cannot be quantized")
