"""One block and its calibration inputs: stage by stage capture, search, fold, correct and round; keep the better."""

from collections.abc import Callable, Collection, Mapping, Sequence
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
    folded_scales,
    keep_scales,
    round_block_plainly,
    round_folded,
    round_plain_parameters,
)
from quant.block_groups import ScaleGroup
from quant.block_pair import BlockPair, CurrentBlock, OriginalBlock
from quant.capture import BlockInput, Child, ClosedChild, run_block
from quant.checkpoint.folded_scales import ModuleScales
from quant.fast_products import fast_products
from quant.input_statistics import (
    InputStatistics,
    PairStatistics,
    Streams,
    capture,
    capture_pair,
    relative_weights,
    routed_names,
)
from quant.kept_states import KeptChunks
from quant.kept_tensors import Scratch
from quant.machine_memory import give_back_freed
from quant.report import BlockError, LayerLoss
from quant.residual import BLOCK, StreamWriter
from quant.salience import LinearChannels, measure_salience

# the noise of products that read bfloat16 stays well under this; a scale folded wrongly is off by more than 0.01
MAX_FOLD_ERROR = 1e-3


@dataclass(frozen=True)
class BlockOutcome:
    """A quantized block: packed weights by linear name, the next block's inputs, and the numbers for the report.

    scales: what is folded into the block, by linear name; of no expert, as none takes an adapter.
    """

    packed: Mapping[str, PackedWeight]
    scales: Mapping[str, ModuleScales]
    next_streams: Streams
    layers: tuple[LayerLoss, ...]
    error: BlockError


@dataclass(frozen=True)
class OpenBlock:
    """A block with the source's weights, of that name and index in the model.

    read_again: gives parameters of these names the source's values, in place.
    """

    module: nn.Module
    name: str
    index: int
    read_again: Callable[[Collection[str]], None]

    def restore(self, names: Collection[str], plan: BlockPlan) -> None:
        """Give parameters of these names the source's values again, or those that will be stored of them."""
        self.read_again(names)
        round_plain_parameters(self.module, self.name, plan)

    def restore_all(self, plan: BlockPlan) -> None:
        """Give all parameters the source's values again, or those that will be stored of them."""
        self.restore([name for name, _ in self.module.named_parameters()], plan)


def search_block(opened: OpenBlock, streams: Streams, plan: BlockPlan, scratch: Scratch) -> BlockOutcome:
    """Quantize the block in place by the plan's steps, or plainly where that is better.

    Attention is quantized before what the MLP reads is looked at, and so on: each stage sees the error of the ones
    before, and what adds to the stream that of all others of its stage. Raises QuantizationError naming the module
    whose input is not finite.
    """
    block, name = opened.module, opened.name
    with fast_products():
        # without a correction nothing but the sample is compared with the original
        chunks = streams.original if plan.steps.correction else [streams.original[0]]
        original = OriginalBlock.run(block, opened.index, chunks, *_compared(block, plan), scratch)
    token_weights = relative_weights(original.outputs)
    before, target = streams.original[0].hidden, original.outputs[0].hidden
    round_plain_parameters(block, name, plan)
    current = CurrentBlock(block, opened.index, streams.current, scratch)
    if not all(bool(torch.isfinite(weights).all()) for weights in token_weights):
        in_order = [group.observed for stage in stages_of(block, plan.groups) for group in stage]
        _check_inputs(name, capture(current, in_order))
        check_finite(f"the output of {name}", torch.cat(token_weights))
    plain_error = _change(_try_plainly(opened, plan, streams.current[0]), target, before)
    results, channels, scales = _search_stages(opened, BlockPair(original, current), plan, token_weights)
    with fast_products():
        reached = KeptChunks(scratch, (current.run(number) for number in range(len(streams.current))))
    chosen_error = _change(reached[0].hidden, target, before)
    if chosen_error <= plain_error:
        kept, packed = "searched", {linear: result.packed for linear, result in results.items()}
        layers = _searched_losses(name, results, channels)
    else:
        opened.restore_all(plan)
        kept, packed, scales = "plain", round_block_plainly(block, plan), {}
        with fast_products():
            reached = KeptChunks(scratch, (run_block(block, opened.index, chunk) for chunk in streams.current))
        layers = _plain_losses(name, results, channels)
    return BlockOutcome(
        packed=packed,
        scales=scales,
        next_streams=Streams(original.outputs if plan.steps.correction else reached, reached),
        layers=layers,
        error=BlockError(name, plain_error, min(chosen_error, plain_error), kept),
    )


def _try_plainly(opened: OpenBlock, plan: BlockPlan, chunk: BlockInput) -> Tensor:
    """What the block gives for the chunk when it is rounded plainly; it is as it was afterwards.

    Tried before the search, so that the original's weights need not be in memory beside it.
    """
    round_block_plainly(opened.module, plan)
    with fast_products():
        output = run_block(opened.module, opened.index, chunk).hidden
    opened.restore_all(plan)
    return output


def _search_stages(
    opened: OpenBlock, pair: BlockPair, plan: BlockPlan, token_weights: Sequence[Tensor]
) -> tuple[dict[str, LayerResult], dict[str, LinearChannels], dict[str, ModuleScales]]:
    """Quantize the linears of the block stage by stage, in place, by name.

    And how each was before, and what has been folded into it; of experts that is left out.
    """
    results: dict[str, LayerResult] = {}
    channels: dict[str, LinearChannels] = {}
    scales: dict[str, ModuleScales] = {}
    block, name = opened.module, opened.name
    routed = routed_names(block)
    num_bytes = sum(parameter.nbytes for parameter in block.parameters())
    stages = stages_of(block, plan.groups)
    for place, stage in enumerate(stages):
        pair.current.settle(settled_children(plan.order, (), stages[place:]))
        waves = waves_of(stage, plan.writers)
        statistics = _capture(pair, waves, plan, token_weights)
        give_back_freed(num_bytes)
        inputs = statistics.inputs()
        _check_inputs(name, inputs)
        channels |= describe_linears(block, stage, plan, inputs)
        folded = _fold(opened, pair.current, stage, plan, inputs)
        del inputs
        scales |= {linear: own for linear, own in folded_scales(stage, folded).items() if linear not in routed}
        # what is yet to be rounded is to see what will be stored
        round_plain_parameters(block, name, plan)
        results |= round_folded(block, waves[0], plan, statistics, folded)
        # before the next are added up: the widest input's take as much as half a block
        del statistics
        for number, wave in enumerate(waves[1:], start=1):
            pair.current.settle(settled_children(plan.order, waves[number:], stages[place + 1 :]))
            # what it reads, and the stream it adds to, have changed with what was rounded before it
            changed = _capture(pair, [wave], plan, token_weights)
            give_back_freed(num_bytes)
            changed.unscale_(folded[wave[0].observed].scale)
            results |= round_folded(block, wave, plan, changed, folded)
            del changed
    return results, channels, scales


def _check_inputs(name: str, inputs: Mapping[str, InputStatistics]) -> None:
    """Raises QuantizationError naming the first module of the block of that name that reads a NaN or an infinity."""
    for observed, statistics in inputs.items():
        # what is not finite in a token is not finite in its own square
        check_finite(f"the input of {name}.{observed}", statistics.gram.diagonal())


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


def settled_children(
    order: Sequence[Child], waves: Sequence[Sequence[ScaleGroup]], stages: Sequence[Sequence[ScaleGroup]]
) -> list[ClosedChild]:
    """Those of the children in that order whose closing linear reads what it will read to the end.

    waves: the groups of the present stage that are still to be rounded; their scales are folded. stages: those to come.
    """
    to_come = [group for groups in (*waves, *stages) for group in groups]
    changing = {linear for group in to_come for linear in group.linears}
    changing |= {group.source.name for groups in stages for group in groups if group.source is not None}
    settled = []
    for child in order:
        inside = {name for name in changing if f"{name}.".startswith(f"{child.name}.")}
        if isinstance(child, ClosedChild) and inside <= {child.closing}:
            settled.append(child)
        if inside:
            break
    return settled


def waves_of(stage: Sequence[ScaleGroup], writers: Mapping[str, StreamWriter]) -> list[tuple[ScaleGroup, ...]]:
    """The groups of a stage in sets that are rounded one after the other; at least one.

    Each group with a linear that adds to the stream comes alone, after all that do not: it makes up for their rounding
    errors as well, and no two make up for the same drift.
    """
    adding = [group for group in stage if writers.keys() & {*group.linears}]
    others = tuple(group for group in stage if group not in adding)
    return [wave for wave in (others, *((group,) for group in adding)) if wave]


def _compared(block: nn.Module, plan: BlockPlan) -> tuple[set[str], set[str]]:
    """The modules whose inputs, and those whose outputs, are compared with the original's."""
    if not plan.steps.correction:
        return set(), set()
    places = {writer.reader for writer in plan.writers.values()}
    # what adds to the stream is compared there, where it is read
    read = {group.observed for group in plan.groups if not plan.writers.keys() >= {*group.linears}}
    return (read - routed_names(block)) | (places - {BLOCK}), places & {BLOCK}


def _capture(
    pair: BlockPair,
    waves: Sequence[Sequence[ScaleGroup]],
    plan: BlockPlan,
    token_weights: Sequence[Tensor],
) -> PairStatistics:
    """What the first wave is corrected with, and what the scales of all waves are searched with."""
    if not plan.steps.correction:
        names = list(dict.fromkeys(group.observed for wave in waves for group in wave))
        return PairStatistics({}, capture(pair.current, names))
    observed = {linear: group.observed for group in waves[0] for linear in group.linears}
    own = {linear: writer for linear, writer in plan.writers.items() if linear in observed}
    later = [group.observed for wave in waves[1:] for group in wave]
    return capture_pair(pair, observed, own, later, token_weights)


def _fold(
    opened: OpenBlock,
    current: CurrentBlock,
    stage: Sequence[ScaleGroup],
    plan: BlockPlan,
    inputs: Mapping[str, InputStatistics],
) -> dict[str, FoldedGroup]:
    """Search and fold the scales of a stage; all are left at 1 where folding changes what the block computes.

    Nothing that it touches has been changed before.
    """
    block = opened.module
    choices = choose_scales(block, stage, plan, inputs)
    if not plan.steps.scales:
        return keep_scales(block, stage, choices)
    with fast_products():
        expected = current.run(0).hidden
        folded = fold_scales(block, stage, choices)
        reached = current.run(0).hidden
    if _change(reached, expected, current.chunks[0].hidden) < MAX_FOLD_ERROR:
        return folded
    touched = {name for group in stage for name in (*group.linears, *group.kept)}
    touched |= {group.source.name for group in stage if group.source is not None}
    opened.restore([name for name, _ in block.named_parameters() if name.rpartition(".")[0] in touched], plan)
    return keep_scales(block, stage, choices)


def _change(output: Tensor, target: Tensor, before: Tensor) -> float:
    """The mean over tokens of |output - target|^2 / |target - before|^2: the error as a share of what the block adds.

    By token, because the first one's states are far larger than all others' in many models.
    """
    error = (output - target).square().sum(dim=-1)
    added = (target - before).square().sum(dim=-1)
    return float((error / added.clamp(min=torch.finfo(torch.float32).tiny)).mean())
