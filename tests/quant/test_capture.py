"""Capture: what the linears of a block read, without changing what the model computes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant import capture as capture_module
from quant.capture import capture, embed, run_block
from quant.pipeline import DECODER, blocks_of
from tests.tiny_models import TINY_MODEL_TYPES, save_tiny_model

TOKENS = torch.arange(5 * 40).view(5, 40) * 7 % 256


def open_tiny(model_type: str, directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(model_type, directory)).eval()


@pytest.mark.parametrize("model_type", TINY_MODEL_TYPES)
def test_blocks_run_one_by_one_give_what_the_whole_model_gives(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # chunks of two sequences, the last one of one; mistral's window of 24 tokens is shorter than a sequence
    monkeypatch.setattr(capture_module, "CHUNK_TOKENS", 80)
    model = open_tiny(model_type, tmp_path)
    with torch.no_grad():
        inputs = embed(model.get_submodule(DECODER), TOKENS)
        assert [len(chunk.hidden) for chunk in inputs] == [2, 2, 1]
        for index, block in enumerate(blocks_of(model).values()):
            inputs = [run_block(block, index, chunk) for chunk in inputs]
        states = model.get_submodule("model.norm")(torch.cat([chunk.hidden for chunk in inputs]))
        torch.testing.assert_close(model.get_submodule("lm_head")(states), model(TOKENS).logits)


def test_statistics_are_those_of_all_tokens_that_the_linear_reads(tmp_path: Path) -> None:
    model = open_tiny("llama", tmp_path)
    block = model.get_submodule("model.layers.0")
    with torch.no_grad():
        inputs = embed(model.get_submodule(DECODER), TOKENS)
        captured = capture(block, 0, inputs, ["self_attn.q_proj"])
        read = block.get_submodule("input_layernorm")(torch.cat([chunk.hidden for chunk in inputs])).reshape(-1, 64)
    statistics = captured.statistics["self_attn.q_proj"]
    torch.testing.assert_close(statistics.gram, read.T @ read / len(read))
    torch.testing.assert_close(statistics.mean_magnitude, read.abs().mean(dim=0))


def test_capture_leaves_no_hook_behind(tmp_path: Path) -> None:
    model = open_tiny("qwen3", tmp_path)
    block = model.get_submodule("model.layers.0")
    with torch.no_grad():
        capture(block, 0, embed(model.get_submodule(DECODER), TOKENS[:1]), ["mlp.down_proj"])
    assert not block.get_submodule("mlp.down_proj")._forward_pre_hooks
    assert len(blocks_of(model)) == 2
