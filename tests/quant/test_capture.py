"""Capture: what the linears of a block read, without changing what the model computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant import capture as capture_module
from quant.capture import StatisticsSum, capture, embed, run_block
from quant.errors import SourceError
from quant.model_structure import find_blocks
from tests.quant.tiny_families import VARIANTS, Variant, open_tiny

TOKENS = torch.arange(5 * 40).view(5, 40) * 7 % 256


def llama(directory: Path) -> PreTrainedModel:
    return open_tiny(VARIANTS[0], directory)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_blocks_run_one_by_one_give_what_the_whole_model_gives(
    variant: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # chunks of two sequences, the last one of one; sliding windows are shorter than a sequence
    monkeypatch.setattr(capture_module, "CHUNK_TOKENS", 80)
    model = open_tiny(variant, tmp_path)
    stack = find_blocks(model)
    states: list[Tensor] = []
    last = list(stack.blocks.values())[-1]
    last.register_forward_hook(lambda _module, _arguments, output: states.append(output))
    with torch.no_grad():
        model(TOKENS)
        expected = states[0][0] if isinstance(states[0], tuple) else states[0]
        inputs = embed(stack, TOKENS)
        assert [len(chunk.hidden) for chunk in inputs] == [2, 2, 1]
        for index, block in enumerate(stack.blocks.values()):
            inputs = [run_block(block, index, chunk) for chunk in inputs]
    torch.testing.assert_close(torch.cat([chunk.hidden for chunk in inputs]), expected)


def test_statistics_are_those_of_all_tokens_that_the_linear_reads(tmp_path: Path) -> None:
    model = llama(tmp_path)
    block = model.get_submodule("model.layers.0")
    with torch.no_grad():
        inputs = embed(find_blocks(model), TOKENS)
        captured = capture(block, 0, inputs, ["self_attn.q_proj"])
        read = block.get_submodule("input_layernorm")(torch.cat([chunk.hidden for chunk in inputs])).reshape(-1, 64)
    statistics = captured.statistics["self_attn.q_proj"]
    torch.testing.assert_close(statistics.gram, read.T @ read / len(read))
    torch.testing.assert_close(statistics.mean_magnitude, read.abs().mean(dim=0))


def test_capture_leaves_no_hook_behind(tmp_path: Path) -> None:
    model = llama(tmp_path)
    block = model.get_submodule("model.layers.0")
    with torch.no_grad():
        capture(block, 0, embed(find_blocks(model), TOKENS[:1]), ["mlp.down_proj"])
    assert not block.get_submodule("mlp.down_proj")._forward_pre_hooks
    assert len(find_blocks(model).blocks) == 2


def test_experts_that_few_tokens_reach_are_shown_all(tmp_path: Path) -> None:
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == "qwen3-moe"), tmp_path)
    block = find_blocks(model).blocks["model.layers.0"]
    # given a router that sends no token to expert 3
    read: list[Tensor] = []
    block.get_submodule("mlp.gate").register_forward_pre_hook(lambda _module, arguments: read.append(arguments[0]))
    with torch.no_grad():
        inputs = embed(find_blocks(model), TOKENS)
        run_block(block, 0, inputs[0])
        block.get_submodule("mlp.gate").get_parameter("weight")[3] = -100 * read[0].mean(dim=0)
        read.clear()
        captured = capture(block, 0, inputs, ["mlp.experts.0.down_proj", "mlp.experts.3.down_proj"])
        expert = block.get_submodule("mlp.experts.3")
        states = torch.cat(read[: len(inputs)])
        activations = torch.nn.functional.silu(expert.gate_proj(states)) * expert.up_proj(states)
    shown = captured.statistics["mlp.experts.3.down_proj"]
    torch.testing.assert_close(shown.gram, activations.T @ activations / len(activations))
    assert not block.get_submodule("mlp.experts")._forward_pre_hooks


def test_an_expert_that_many_tokens_reach_is_known_by_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_module, "MIN_EXPERT_TOKENS", 2)
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == "qwen3-moe"), tmp_path)
    block = find_blocks(model).blocks["model.layers.0"]
    read: list[Tensor] = []
    with torch.no_grad():
        inputs = embed(find_blocks(model), TOKENS)
        block.get_submodule("mlp.experts.0.down_proj").register_forward_pre_hook(
            lambda _module, arguments: read.append(arguments[0])
        )
        captured = capture(block, 0, inputs, ["mlp.experts.0.down_proj"])
    own = torch.cat(read)
    assert 2 <= len(own) < TOKENS.numel()
    torch.testing.assert_close(captured.statistics["mlp.experts.0.down_proj"].gram, own.T @ own / len(own))


def test_of_an_input_that_no_token_reaches_every_channel_counts_the_same() -> None:
    statistics = StatisticsSum(3).result()
    assert torch.equal(statistics.gram, torch.eye(3))
    assert torch.equal(statistics.mean_magnitude, torch.ones(3))


def test_a_decoder_that_changes_states_between_blocks_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path)
    stack = find_blocks(model)

    class Doubling(nn.Module):
        """A decoder that is not just its blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = stack.decoder.get_submodule("layers")

        def forward(self, token_ids: Tensor, *, use_cache: bool) -> Tensor:
            hidden = torch.zeros(*token_ids.shape, 64)
            for layer in self.layers:
                hidden = layer(2 * hidden, position_embeddings=(torch.ones(1, 1, 16), torch.zeros(1, 1, 16)))
            return hidden

    with torch.no_grad(), pytest.raises(SourceError, match="Doubling changes the states between its blocks"):
        embed(replace(stack, decoder=Doubling()), TOKENS)
