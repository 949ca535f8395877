"""Experts as linears of their own compute what transformers' experts module computes."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from quant.errors import SourceError
from quant.linear_experts import LinearExperts, linearize_experts
from quant.scale_groups import ExpertNames, family_of
from tests.quant.tiny_families import TOKENS, VARIANTS, Variant
from tests.tiny_models import save_tiny_model

NAMES = ExpertNames("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    "variant", [variant for variant in VARIANTS if family_of(variant.model_type).expert_names], ids=str
)
def test_the_model_gives_the_same_logits(variant: Variant, tmp_path: Path) -> None:
    saved = save_tiny_model(variant.model_type, tmp_path, config_overrides=variant.fields)
    model = AutoModelForCausalLM.from_pretrained(saved).eval()
    names = family_of(variant.model_type).expert_names
    assert names is not None
    with torch.no_grad():
        expected = model(TOKENS).logits
        linearize_experts(model, names)
        torch.testing.assert_close(model(TOKENS).logits, expected)
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def test_a_token_gets_the_weighted_sum_of_its_experts() -> None:
    model = nn.ModuleDict({"experts": fused_experts(num_experts=2)})
    linearize_experts(model, NAMES)
    experts = model.get_submodule("experts")
    assert isinstance(experts, LinearExperts)
    states = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    chosen, weights = torch.tensor([[0], [1]]), torch.tensor([[0.5], [0.25]])
    with torch.no_grad():
        output = experts(states, chosen, weights)
        each = [experts[number](states[number]) for number in range(2)]
    torch.testing.assert_close(output, torch.stack([0.5 * each[0], 0.25 * each[1]]))


def test_experts_with_other_tensors_are_refused_by_name() -> None:
    model = nn.ModuleDict({"experts": fused_experts(num_experts=2)})
    model.get_submodule("experts").register_parameter("gate_up_proj_bias", nn.Parameter(torch.zeros(2, 6)))
    with pytest.raises(SourceError, match=r"experts holds experts in a way that is not known: .*gate_up_proj_bias"):
        linearize_experts(model, NAMES)


def fused_experts(num_experts: int) -> nn.Module:
    """As transformers holds them: width 2, intermediate width 3."""
    experts = nn.Module()
    generator = torch.Generator().manual_seed(3)
    experts.gate_up_proj = nn.Parameter(torch.randn(num_experts, 6, 2, generator=generator))
    experts.down_proj = nn.Parameter(torch.randn(num_experts, 2, 3, generator=generator))
    experts.act_fn = nn.SiLU()
    return experts
