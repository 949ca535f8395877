"""Experts as linears of their own compute what transformers' experts modules compute, or stay in one."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.linear_experts import LinearExperts, linearize_experts
from tests.quant.tiny_families import EXPERTS, TOKENS
from tests.tiny_models import save_tiny_model

EXPERTS_4 = {"num_local_experts": 4}
SHARED = {"shared_expert_intermediate_size": 64}


def open_fused(model_type: str, directory: Path, **fields: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(model_type, directory, config_overrides=fields)).eval()


@pytest.mark.parametrize(
    ("model_type", "fields", "linears"),
    [
        ("mixtral", EXPERTS_4, ["w1", "w3", "w2"]),
        ("qwen2_moe", {**EXPERTS, **SHARED}, ["gate_proj", "up_proj", "down_proj"]),
        ("qwen3_moe", EXPERTS, ["gate_proj", "up_proj", "down_proj"]),
        ("olmoe", EXPERTS, ["gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_experts_are_linears_with_the_checkpoints_names_and_the_logits_stay(
    model_type: str, fields: dict[str, object], linears: list[str], tmp_path: Path
) -> None:
    model = open_fused(model_type, tmp_path, **fields)
    with torch.no_grad():
        expected = model(TOKENS).logits
        linearize_experts(model)
        torch.testing.assert_close(model(TOKENS).logits, expected)
    expert = model.get_submodule("model.layers.1.mlp.experts.3")
    assert [name for name, module in expert.named_children() if isinstance(module, torch.nn.Linear)] == linears
    assert not [name for name, parameter in model.named_parameters() if parameter.dim() == 3]


def test_a_token_gets_the_weighted_sum_of_its_experts(tmp_path: Path) -> None:
    model = open_fused("qwen3_moe", tmp_path, **EXPERTS)
    linearize_experts(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, LinearExperts)
    states = torch.linspace(-1, 1, 128).view(2, 64)
    chosen, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.5, 0.25], [0.75, 0.125]])
    with torch.no_grad():
        output = experts(states, chosen, weights)
        first = 0.5 * experts[0](states[:1]) + 0.25 * experts[3](states[:1])
        second = 0.75 * experts[2](states[1:]) + 0.125 * experts[1](states[1:])
    torch.testing.assert_close(output, torch.cat([first, second]))


def test_the_weights_are_not_copied(tmp_path: Path) -> None:
    model = open_fused("qwen3_moe", tmp_path, **EXPERTS)
    start = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").data_ptr()
    linearize_experts(model)
    assert model.get_parameter("model.layers.0.mlp.experts.0.gate_proj.weight").data_ptr() == start


def test_experts_with_biases_and_a_gate_of_their_own_stay_as_they_are(tmp_path: Path) -> None:
    model = open_fused("gpt_oss", tmp_path, **EXPERTS_4)
    linearize_experts(model)
    assert model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").dim() == 3


def test_experts_that_compute_something_else_stay_as_they_are(tmp_path: Path) -> None:
    model = open_fused("qwen3_moe", tmp_path, **EXPERTS)

    class Clamped(torch.nn.Module):
        """An activation that transformers' module does not use, as if it cut off what is large."""

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(states).clamp(max=1)

    experts = model.get_submodule("model.layers.0.mlp.experts")
    plain = experts.act_fn
    experts._apply_gate = lambda states: plain(states.chunk(2, dim=-1)[0]) * states.chunk(2, dim=-1)[1]
    experts.act_fn = Clamped()
    linearize_experts(model)
    assert not isinstance(model.get_submodule("model.layers.0.mlp.experts"), LinearExperts)
    assert isinstance(model.get_submodule("model.layers.1.mlp.experts"), LinearExperts)
