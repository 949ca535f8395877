"""One block and its calibration inputs: stage by stage capture, search, fold, correct and round; keep the better."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.layout import PackedWeight
from quant.block import (
    BlockPlan,
    FoldedGroup,
    LayerResult,
    check_finite,
    choose_scales,
    describe_linears,
    fold_scales,
    keep_scales,
    round_block_plainly,
    round_folded,
    round_plain_parameters,
)
from quant.block_groups import ScaleGroup
from quant.capture import run_block
from quant.input_statistics import BlockPair, PairStatistics, Streams, capture, capture_pair, relative_weights
from quant.report import BlockError, LayerLoss
from quant.residual import StreamWriter, find_stream_writers
from quant.salience import LinearChannels, measure_salience

# float32 rounding over a block stays well under this; a scale folded wrongly is off by more than 0.01
MAX_FOLD_ERROR = 1e-4


@dataclass(frozen=True)
class BlockOutcome:
    """A quantized block: packed weights by linear name, the next block's inputs, and the numbers for the report."""

    packed: Mapping[str, PackedWeight]
    next_streams: Streams
    layers: tuple[LayerLoss, ...]
    error: BlockError


def search_block(block: nn.Module, name: str, index: int, streams: Streams, plan: BlockPlan) -> BlockOutcome:
    """Quantize the block of that name and index in place by the plan's steps, or plainly where that is better.

    Attention is quantized before what the MLP reads is looked at, and so on: each stage sees the error of the ones
    before, and what adds to the stream that of all others of its stage. Raises QuantizationError naming the module
    whose input is not finite.
    """
    pair = BlockPair(index, copy.deepcopy(block), block, streams)
    # without a correction nothing but the sample is compared with the original
    followed = streams.original if plan.steps.correction else streams.original[:1]
    outputs = [run_block(pair.original, index, chunk) for chunk in followed]
    token_weights = relative_weights(outputs)
    writers = (
        find_stream_writers(block, index, streams.original[0], plan.linear_names()) if plan.steps.correction else {}
    )
    sample, target = streams.current[0], outputs[0].hidden
    results: dict[str, LayerResult] = {}
    channels: dict[str, LinearChannels] = {}
    for stage in stages_of(block, plan.groups):
        waves = waves_of(stage, writers)
        statistics = _capture(pair, waves, plan, writers, token_weights)
        for observed, inputs in statistics.inputs.items():
            check_finite(f"the input of {name}.{observed}", inputs.gram)
        channels |= describe_linears(block, stage, plan, statistics.inputs)
        folded = _fold(pair, stage, plan, statistics)
        results |= round_folded(block, waves[0], plan, statistics, folded)
        for wave in waves[1:]:
            # what it reads, and the stream it adds to, have changed with what was rounded before it
            changed = _capture(pair, [wave], plan, writers, token_weights).unscaled(folded[wave[0].observed].scale)
            results |= round_folded(block, wave, plan, changed, folded)
    chosen_error = _change(run_block(block, index, sample).hidden, target, streams.original[0].hidden)
    plain = copy.deepcopy(pair.original)
    plain_packed = round_block_plainly(plain, plan)
    plain_error = _change(run_block(plain, index, sample).hidden, target, streams.original[0].hidden)

    if chosen_error <= plain_error:
        kept, packed = "searched", {linear: result.packed for linear, result in results.items()}
        layers = _searched_losses(name, results, channels)
    else:
        block.load_state_dict(plain.state_dict())
        kept, packed = "plain", plain_packed
        layers = _plain_losses(name, results, channels)
    round_plain_parameters(block, name, plan)
    current = [run_block(block, index, chunk) for chunk in streams.current]
    return BlockOutcome(
        packed=packed,
        next_streams=Streams(outputs if plan.steps.correction else current, current),
        layers=layers,
        error=BlockError(name, plain_error, min(chosen_error, plain_error), kept),
    )


def _searched_losses(
    block_name: str, results: Mapping[str, LayerResult], channels: Mapping[str, LinearChannels]
) -> tuple[LayerLoss, ...]:
    return tuple(
        LayerLoss(
            name=f"{block_name}.{linear}",
            formula=result.formula,
            plain=result.plain_loss,
            chosen=result.loss,
            salience=measure_salience(channels[linear], result.channel_errors),
        )
        for linear, result in results.items()
    )


def _plain_losses(
    block_name: str, results: Mapping[str, LayerResult], channels: Mapping[str, LinearChannels]
) -> tuple[LayerLoss, ...]:
    return tuple(
        LayerLoss(
            name=f"{block_name}.{linear}",
            formula="plain",
            plain=result.plain_loss,
            chosen=result.plain_loss,
            salience=measure_salience(channels[linear], channels[linear].plain_errors),
        )
        for linear, result in results.items()
    )


def stages_of(block: nn.Module, groups: Sequence[ScaleGroup]) -> list[tuple[ScaleGroup, ...]]:
    """The groups in sets that are quantized at once: those whose scales fold into linears of each other are together.

    A set keeps the order of its groups; sets come in the order in which their first linears stand in the block.
    """
    stages: list[list[ScaleGroup]] = []
    for group in groups:
        source = None if group.source is None else group.source.name
        home = next((stage for stage in stages if any(source in other.linears for other in stage)), None)
        if home is None:
            stages.append([group])
        else:
            home.append(group)
    places = {name: place for place, (name, _) in enumerate(block.named_modules())}
    return sorted(map(tuple, stages), key=lambda stage: min(places[name] for group in stage for name in group.linears))


def waves_of(stage: Sequence[ScaleGroup], writers: Mapping[str, StreamWriter]) -> list[tuple[ScaleGroup, ...]]:
    """The groups of a stage in sets that are rounded one after the other; at least one.

    Each group with a linear that adds to the stream comes alone, after all that do not: it makes up for their rounding
    errors as well, and no two make up for the same drift.
    """
    adding = [group for group in stage if writers.keys() & {*group.linears}]
    others = tuple(group for group in stage if group not in adding)
    return [wave for wave in (others, *((group,) for group in adding)) if wave]


def _capture(
    pair: BlockPair,
    waves: Sequence[Sequence[ScaleGroup]],
    plan: BlockPlan,
    writers: Mapping[str, StreamWriter],
    token_weights: Sequence[Tensor],
) -> PairStatistics:
    """What the first wave is corrected with, and what the scales of all waves are searched with."""
    if not plan.steps.correction:
        names = list(dict.fromkeys(group.observed for wave in waves for group in wave))
        return PairStatistics(capture(pair.current, pair.index, pair.streams.current, names), {})
    observed = {linear: group.observed for group in waves[0] for linear in group.linears}
    own = {linear: writer for linear, writer in writers.items() if linear in observed}
    later = [group.observed for wave in waves[1:] for group in wave]
    return capture_pair(pair, observed, own, later, token_weights)


def _fold(
    pair: BlockPair, stage: Sequence[ScaleGroup], plan: BlockPlan, statistics: PairStatistics
) -> dict[str, FoldedGroup]:
    """Search and fold the scales of a stage; all are left at 1 where folding changes what the block computes."""
    block, sample = pair.current, pair.streams.current[0]
    choices = choose_scales(block, stage, plan, statistics.inputs)
    if not plan.steps.scales:
        return keep_scales(block, stage, choices)
    before = copy.deepcopy(block.state_dict())
    expected = run_block(block, pair.index, sample).hidden
    folded = fold_scales(block, stage, choices)
    if _change(run_block(block, pair.index, sample).hidden, expected, sample.hidden) < MAX_FOLD_ERROR:
        return folded
    block.load_state_dict(before)
    return keep_scales(block, stage, choices)


def _change(output: Tensor, target: Tensor, before: Tensor) -> float:
    """The mean over tokens of |output - target|^2 / |target - before|^2: the error as a share of what the block adds.

    By token, because the first one's states are far larger than all others' in many models.
    """
    error = (output - target).square().sum(dim=-1)
    added = (target - before).square().sum(dim=-1)
    return float((error / added.clamp(min=torch.finfo(torch.float32).tiny)).mean())
