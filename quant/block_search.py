"""AWQ on one block and its calibration inputs: capture, search, check that folding is exact, keep the better."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.layout import PackedWeight
from quant.block import BlockPlan, check_finite, fold_scales, round_block_plainly, round_folded
from quant.capture import BlockInput, capture, run_block
from quant.errors import QuantizationError
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

    Raises QuantizationError naming the block when its output is not finite or folding changed its function.
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
    if not fold_error < MAX_FOLD_ERROR:
        raise QuantizationError(f"folding scales changed the output of {name} by {fold_error:.2g} of itself")
    results = round_folded(block, plan, captured.statistics, folded)
    chosen_error = _change(run_block(block, index, sample).hidden, target, sample.hidden)

    packed = {linear: result.packed for linear, result in results.items()}
    layers = tuple(
        LayerLoss(f"{name}.{linear}", result.formula, result.plain_loss, result.loss)
        for linear, result in results.items()
    )
    kept = "searched"
    if not chosen_error <= plain_error:
        block.load_state_dict(plain.state_dict())
        packed, kept = plain_packed, "plain"
    return BlockOutcome(
        packed=packed,
        next_inputs=[run_block(block, index, chunk) for chunk in inputs],
        layers=layers,
        error=BlockError(name, plain_error, chosen_error, kept),
    )


def _change(output: Tensor, target: Tensor, before: Tensor) -> float:
    """The mean over tokens of |output - target|^2 / |target - before|^2: the error as a share of what the block adds.

    By token, because the first one's states are far larger than all others' in many models.
    """
    error = (output - target).square().sum(dim=-1)
    added = (target - before).square().sum(dim=-1)
    return float((error / added.clamp(min=torch.finfo(torch.float32).tiny)).mean())
