"""The memory of the quantizer is measured on a model of the size that was asked for, in a process of its own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.quantizer_memory import main
from benchmarks.random_model import ModelShape, write_random_model

SHAPE = ModelShape(num_blocks=2, hidden_size=64, mlp_size=96, num_heads=4, num_kv_heads=2, vocab_size=272)


def test_a_random_model_has_the_shape_that_was_asked_for(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", SHAPE)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPE.parameters
    block = model.get_submodule("model.layers.1")
    assert sum(parameter.numel() for parameter in block.parameters()) == SHAPE.block_parameters
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(32)[None]).logits).all())


def test_a_peak_stands_beside_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "figures.json"
    assert main(["--blocks=2", "--width=128", "--vocab=272", "--methods", "rtn", "--json", str(figures)]) == 0
    (row,) = json.loads(figures.read_text())["measurements"]
    # 4 x 128 x 128 of the attention, 3 x 128 x 352 of the MLP, two norms
    assert row["bound_bytes"] == int(1.5 * 4 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128)) + 2 * 10**9
    # the program alone has more than a hundred MB
    assert 10**8 < row["peak_bytes"] < row["bound_bytes"]
    assert f"{row['peak_bytes'] / 1e9:.2f} GB" in capsys.readouterr().out


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--methods", "magic"])
    assert "invalid Method value: 'magic'" in capsys.readouterr().err
