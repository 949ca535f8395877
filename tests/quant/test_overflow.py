"""The first module whose output is not finite is found by name, and the model stays as it was."""

from pathlib import Path

import torch

from quant.overflow import first_not_finite
from quant.source import open_source
from tests.tiny_models import save_tiny_model

TOKENS = torch.arange(8)[None]


def test_the_first_module_that_overflows_is_named(tmp_path: Path) -> None:
    model = open_source(save_tiny_model("llama", tmp_path)).model
    with torch.no_grad():
        # given two modules that overflow, the later one by itself too
        model.get_parameter("model.layers.0.mlp.gate_proj.weight").fill_(3e38)
        model.get_parameter("model.norm.weight").fill_(float("inf"))

    assert first_not_finite(model, lambda: model(TOKENS)) == "model.layers.0.mlp.gate_proj"
    assert not any(module._forward_hooks for module in model.modules())


def test_where_everything_is_finite_no_module_is_named(tmp_path: Path) -> None:
    model = open_source(save_tiny_model("llama", tmp_path)).model
    assert first_not_finite(model, lambda: model(TOKENS)) is None
