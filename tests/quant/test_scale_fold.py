"""Folding moves scales between operations and leaves the function of every family as it was."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quant.pipeline import blocks_of
from quant.scale_fold import fold, source_weight, spread_of
from quant.scale_groups import groups_for, linear_of
from quant.scale_search import ChannelSpread
from tests.tiny_models import TINY_MODEL_TYPES, save_tiny_model

HEAD_WIDTH = 16
TOKENS = torch.arange(40).view(2, 20) * 5 % 256


def random_scale(num_channels: int) -> torch.Tensor:
    return torch.empty(num_channels).uniform_(0.2, 5, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("model_type", TINY_MODEL_TYPES)
def test_a_model_with_every_group_folded_gives_the_same_logits(model_type: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(model_type, tmp_path / "model")).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        for block in blocks_of(model).values():
            for group in groups_for(model_type):
                spread = spread_of(block, group, HEAD_WIDTH)
                assert spread is not None
                fold(block, group, random_scale(source_weight(block, group).shape[0]), spread)
        folded = model(TOKENS).logits
    torch.testing.assert_close(folded, expected, rtol=1e-3, atol=1e-3)


def test_value_heads_that_several_query_heads_read_are_scaled_together(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path / "model"))
    block = blocks_of(model)["model.layers.0"]
    group = groups_for("llama")[1]
    assert group.source == "self_attn.v_proj"
    assert spread_of(block, group, HEAD_WIDTH) == ChannelSpread(width=HEAD_WIDTH, repeats=2)


def test_rounding_the_norm_costs_nothing_because_linears_get_the_scale_that_it_left() -> None:
    group = groups_for("llama")[2]
    block = nn.ModuleDict(
        {
            "post_attention_layernorm": nn.RMSNorm(8),
            "mlp": nn.ModuleDict({"gate_proj": nn.Linear(8, 4), "up_proj": nn.Linear(8, 4)}),
        }
    )
    norm, gate = block.get_submodule("post_attention_layernorm"), linear_of(block, "mlp.gate_proj")
    before = gate.weight.detach() * norm.get_parameter("weight").detach()
    applied = fold(block, group, random_scale(8), ChannelSpread(width=8, repeats=1))
    stored = norm.get_parameter("weight").detach()
    assert torch.equal(stored, stored.half().float())
    torch.testing.assert_close(gate.weight.detach() * stored, before, rtol=1e-6, atol=0)
    torch.testing.assert_close(applied, random_scale(8), rtol=1e-3, atol=0)


def test_a_channel_that_the_norm_switches_off_is_left_alone() -> None:
    group = groups_for("llama")[2]
    block = nn.ModuleDict(
        {
            "post_attention_layernorm": nn.RMSNorm(8),
            "mlp": nn.ModuleDict({"gate_proj": nn.Linear(8, 4), "up_proj": nn.Linear(8, 4)}),
        }
    )
    with torch.no_grad():
        block.get_submodule("post_attention_layernorm").get_parameter("weight")[3] = 0
    applied = fold(block, group, random_scale(8), ChannelSpread(width=8, repeats=1))
    assert float(applied[3]) == 1
    assert bool(torch.isfinite(linear_of(block, "mlp.up_proj").weight).all())


def test_a_channel_that_float16_could_not_hold_is_left_alone() -> None:
    group = groups_for("llama")[2]
    block = nn.ModuleDict(
        {
            "post_attention_layernorm": nn.RMSNorm(8),
            "mlp": nn.ModuleDict({"gate_proj": nn.Linear(8, 4), "up_proj": nn.Linear(8, 4)}),
        }
    )
    norm = block.get_submodule("post_attention_layernorm").get_parameter("weight").detach()
    norm[5] = 300
    scale = random_scale(8)
    scale[5] = 1e-3
    applied = fold(block, group, scale, ChannelSpread(width=8, repeats=1))
    assert float(applied[5]) == 1
    assert float(norm[5]) == 300
    assert bool(torch.isfinite(linear_of(block, "mlp.up_proj").weight).all())


def test_shapes_that_do_not_say_how_heads_repeat_are_not_folded() -> None:
    block = nn.ModuleDict({"self_attn": nn.ModuleDict({"v_proj": nn.Linear(48, 24), "o_proj": nn.Linear(80, 48)})})
    assert spread_of(block, groups_for("llama")[1], head_width=16) is None
