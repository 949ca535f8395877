"""Folding moves scales between operations and leaves the function of every family as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn

from quant.block_groups import ScaleGroup, ScaleSource, groups_of
from quant.model_structure import find_blocks
from quant.scale_fold import fold
from quant.scale_groups import linear_of, rows_of
from quant.scale_search import ChannelSpread
from tests.quant.tiny_families import TOKENS, VARIANTS, Variant, open_tiny

GATE_UP = ScaleGroup(
    ScaleSource("norm", run=8, period=8, norm_offset=0), ("gate_proj", "up_proj"), (), ChannelSpread(width=8, repeats=1)
)


def random_scale(num_channels: int) -> torch.Tensor:
    return torch.empty(num_channels).uniform_(0.2, 5, generator=torch.Generator().manual_seed(7))


def norm_and_linears() -> nn.ModuleDict:
    return nn.ModuleDict({"norm": nn.RMSNorm(8), "gate_proj": nn.Linear(8, 4), "up_proj": nn.Linear(8, 4)})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_model_with_every_group_folded_gives_the_same_logits(variant: Variant, tmp_path: Path) -> None:
    model = open_tiny(variant, tmp_path / "model")
    num_folded = 0
    with torch.no_grad():
        expected = model(TOKENS).logits
        for block in find_blocks(model).blocks.values():
            for group in reversed(groups_of(block, rows_of(variant.model_type), model.config)):
                before = linear_of(block, group.linears[0]).weight.clone()
                fold(block, group, random_scale(before.shape[1] // group.spread.repeats))
                assert torch.equal(linear_of(block, group.linears[0]).weight, before) == (group.source is None)
                num_folded += group.source is not None
        folded = model(TOKENS).logits
    assert num_folded > 0
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3)


def test_rounding_the_norm_costs_nothing_because_linears_get_the_scale_that_it_left() -> None:
    block = norm_and_linears()
    norm, gate = block.get_submodule("norm"), linear_of(block, "gate_proj")
    before = gate.weight.detach() * norm.get_parameter("weight").detach()
    applied = fold(block, GATE_UP, random_scale(8)).scale
    stored = norm.get_parameter("weight").detach()
    assert torch.equal(stored, stored.half().float())
    torch.testing.assert_close(gate.weight.detach() * stored, before, rtol=1e-6, atol=0)
    torch.testing.assert_close(applied, random_scale(8), rtol=1e-3, atol=0)


def test_a_channel_that_the_norm_switches_off_is_left_alone() -> None:
    block = norm_and_linears()
    with torch.no_grad():
        block.get_submodule("norm").get_parameter("weight")[3] = 0
    applied = fold(block, GATE_UP, random_scale(8)).scale
    assert float(applied[3]) == 1
    assert bool(torch.isfinite(linear_of(block, "up_proj").weight).all())


def test_a_channel_that_float16_could_not_hold_is_left_alone() -> None:
    block = norm_and_linears()
    norm = block.get_submodule("norm").get_parameter("weight").detach()
    norm[5] = 300
    scale = random_scale(8)
    scale[5] = 1e-3
    applied = fold(block, GATE_UP, scale).scale
    assert float(applied[5]) == 1
    assert float(norm[5]) == 300
    assert bool(torch.isfinite(linear_of(block, "up_proj").weight).all())
