"""Measures how much a model's hidden states change when some of its linears are rounded. It keeps no weight.

The measure is the change of the block's output, as a share of the output, by token. Errors of a linear's own output
would not compare: a share of the queries' passes through a softmax, one of the down projection goes straight into
the states. As a share of the states the errors of all blocks compare, because each later norm divides by the states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.bit_allocation import Option, OptionRange, Shape, allocate
from quant.block_groups import ScaleGroup, share_inputs
from quant.blockwise_model import BlockwiseModel
from quant.capture import BlockInput, run_block
from quant.model_plan import ModelPlan
from quant.rounding import round_plainly
from quant.scale_groups import linear_of
from quant.scale_search import Grouping

# all options of all linears are tried, so few tokens must do; each option is tried on the same
SAMPLE_TOKENS = 512


@dataclass(frozen=True)
class Unit:
    """Linears that get the same grouping, by full name, and what they lose with each that they may have."""

    linears: tuple[str, ...]
    options: tuple[Option, ...]


def measure_sensitivity(
    model: BlockwiseModel,
    plan: ModelPlan,
    allowed: OptionRange,
    token_ids: Tensor,
    report: Callable[[int, int], None],
) -> tuple[Unit, ...]:
    """What plain rounding of each unit loses, every other one being as it was; token_ids int64 [sequences, T].

    Linears that read one input are a unit: they run as one layer when they are served. So are the same linears of a
    block's experts, which see too few tokens one by one. report hears how many blocks of how many are measured.
    """
    inputs = list(model.embed(sample_of(token_ids)))
    units: list[Unit] = []
    for index, (name, block_plan) in enumerate(plan.blocks.items()):
        report(index, len(plan.blocks))
        block = model.load_block(index)
        groups = share_inputs(block_plan.groups, block, index, inputs[0])
        outputs = [run_block(block, index, chunk) for chunk in inputs]
        for linears in _units_of(groups):
            num_inputs = linear_of(block, linears[0]).in_features
            options = tuple(
                Option(
                    grouping,
                    sum(_shape_of(block, linear).bits_at(grouping) for linear in linears),
                    _loss(block, index, linears, grouping, inputs, outputs),
                )
                for grouping in allowed.groupings(num_inputs)
            )
            units.append(Unit(tuple(f"{name}.{linear}" for linear in linears), options))
        inputs = outputs
    report(len(plan.blocks), len(plan.blocks))
    return tuple(units)


def mixture_of(units: Sequence[Unit], budget_bits: int) -> dict[str, Grouping]:
    """The grouping of every linear, by full name, within the budget."""
    chosen = allocate([unit.options for unit in units], budget_bits)
    return {name: grouping for unit, grouping in zip(units, chosen, strict=True) for name in unit.linears}


def sample_of(token_ids: Tensor) -> Tensor:
    """About SAMPLE_TOKENS of token_ids [sequences, T]: sequences evenly spread, or the beginning of a longer one."""
    num_rows = max(1, SAMPLE_TOKENS // token_ids.shape[1])
    return token_ids[:: max(1, token_ids.shape[0] // num_rows)][:num_rows, :SAMPLE_TOKENS]


def _units_of(groups: Sequence[ScaleGroup]) -> list[tuple[str, ...]]:
    """The linears that share an input, and with them their like in other experts: the names without numbers agree."""
    units: dict[tuple[str, ...], list[str]] = {}
    for group in groups:
        kinds = dict.fromkeys(".".join(w for w in name.split(".") if not w.isdecimal()) for name in group.linears)
        units.setdefault(tuple(kinds), []).extend(group.linears)
    return [tuple(linears) for linears in units.values()]


def _shape_of(block: nn.Module, linear: str) -> Shape:
    return Shape(*linear_of(block, linear).weight.shape)


def _loss(
    block: nn.Module,
    index: int,
    linears: Sequence[str],
    grouping: Grouping,
    inputs: Sequence[BlockInput],
    outputs: Sequence[BlockInput],
) -> float:
    """The mean over tokens of |change of the block's output|^2 / |output|^2 when these linears are rounded."""
    with _rounded(block, linears, grouping):
        rounded = [run_block(block, index, chunk) for chunk in inputs]
    shares = [
        (new.hidden - old.hidden).square().sum(dim=-1) / old.hidden.square().sum(dim=-1).clamp(min=1e-30)
        for new, old in zip(rounded, outputs, strict=True)
    ]
    return float(torch.cat([share.flatten() for share in shares]).mean())


@contextmanager
def _rounded(block: nn.Module, linears: Sequence[str], grouping: Grouping) -> Iterator[None]:
    weights = [linear_of(block, name).weight for name in linears]
    originals = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(round_plainly(original, grouping.group_size, grouping.bits))
            yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
