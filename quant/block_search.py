"""AWQ on one block and its calibration inputs: capture, search, check that folding is exact, keep the better."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.layout import PackedWeight
from quant.block import BlockPlan, check_finite, fold_scales, round_block_plainly, round_folded
from quant.capture import BlockInput, capture, run_block
from quant.report import BlockError, LayerLoss

# float32 rounding over a block stays well under this; a scale folded wrongly is off by more than 0.01
MAX_FOLD_ERROR = 1e-4


@dataclass(frozen=True)
class BlockOutcome:
    """A quantized block: packed weights by linear name, the next block's inputs, and the numbers for the report."""

    packed: Mapping[str, PackedWeight]
    next_inputs: list[BlockInput]
    layers: tuple[LayerLoss, ...]
    error: BlockError


def search_block(block: nn.Module, name: str, index: int, inputs: list[BlockInput], plan: BlockPlan) -> BlockOutcome:
    """Quantize the block of that name and index in place: scales and ranges searched, or plain where that is better.

    It is rounded plainly too where folding did not leave its function as it was. Raises QuantizationError naming the
    block when its output is not finite.
    """
    captured = capture(block, index, inputs, plan.observed_names())
    for observed, statistics in captured.statistics.items():
        check_finite(f"the input of {name}.{observed}", statistics.gram)
    sample, target = inputs[0], captured.outputs[0].hidden
    plain = copy.deepcopy(block)
    plain_packed = round_block_plainly(plain, plan)
    plain_error = _change(run_block(plain, index, sample).hidden, target, sample.hidden)

    folded = fold_scales(block, plan, captured.statistics)
    fold_error = _change(run_block(block, index, sample).hidden, target, sample.hidden)
    plain_losses = {
        linear: loss
        for group in plan.groups
        for linear, loss in zip(group.linears, folded[group.observed].choice.plain_losses, strict=True)
    }
    chosen_error = plain_error
    if fold_error < MAX_FOLD_ERROR:
        results = round_folded(block, plan, captured.statistics, folded)
        chosen_error = _change(run_block(block, index, sample).hidden, target, sample.hidden)
    if fold_error < MAX_FOLD_ERROR and chosen_error <= plain_error:
        kept, packed = "searched", {linear: result.packed for linear, result in results.items()}
        layers = [
            LayerLoss(f"{name}.{linear}", result.formula, plain_losses[linear], result.loss)
            for linear, result in results.items()
        ]
    else:
        block.load_state_dict(plain.state_dict())
        kept, packed = "plain", plain_packed
        layers = [LayerLoss(f"{name}.{linear}", "plain", loss, loss) for linear, loss in plain_losses.items()]
    return BlockOutcome(
        packed=packed,
        next_inputs=[run_block(block, index, chunk) for chunk in inputs],
        layers=tuple(layers),
        error=BlockError(name, plain_error, chosen_error, kept),
    )


def _change(output: Tensor, target: Tensor, before: Tensor) -> float:
    """The mean over tokens of |output - target|^2 / |target - before|^2: the error as a share of what the block adds.

    By token, because the first one's states are far larger than all others' in many models.
    """
    error = (output - target).square().sum(dim=-1)
    added = (target - before).square().sum(dim=-1)
    return float((error / added.clamp(min=torch.finfo(torch.float32).tiny)).mean())
