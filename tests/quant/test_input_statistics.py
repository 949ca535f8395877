"""What is summed up of the linears' inputs: in one model, and in the quantized one beside the original."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from quant import input_statistics
from quant.block_pair import BlockPair, CurrentBlock, OriginalBlock
from quant.capture import BlockInput, embed, run_block
from quant.device import HOST
from quant.input_statistics import StatisticsSum, capture, capture_pair, relative_weights
from quant.kept_tensors import Scratch
from quant.model_structure import find_blocks
from quant.residual import StreamWriter
from tests.quant.fast_close import assert_close_for_fast_products
from tests.quant.tiny_families import VARIANTS, open_tiny

TOKENS = torch.arange(5 * 40).view(5, 40) * 7 % 256


def test_statistics_are_those_of_all_tokens_that_the_linear_reads(tmp_path: Path) -> None:
    model = open_tiny(VARIANTS[0], tmp_path)
    block = model.get_submodule("model.layers.0")
    with torch.no_grad():
        inputs = list(embed(find_blocks(model), TOKENS))
        captured = capture(CurrentBlock(block, 0, inputs, Scratch()), ["self_attn.q_proj"])
        read = block.get_submodule("input_layernorm")(torch.cat([chunk.hidden for chunk in inputs])).reshape(-1, 64)
    statistics = captured["self_attn.q_proj"]
    assert_close_for_fast_products(statistics.gram, read.T @ read / len(read))
    torch.testing.assert_close(statistics.mean_magnitude, read.abs().mean(dim=0))


def test_experts_that_few_tokens_reach_are_shown_all(tmp_path: Path) -> None:
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == "qwen3-moe"), tmp_path)
    block = find_blocks(model).blocks["model.layers.0"]
    # given a router that sends no token to expert 3
    read: list[Tensor] = []
    block.get_submodule("mlp.gate").register_forward_pre_hook(lambda _module, arguments: read.append(arguments[0]))
    with torch.no_grad():
        inputs = list(embed(find_blocks(model), TOKENS))
        run_block(block, 0, inputs[0])
        block.get_submodule("mlp.gate").get_parameter("weight")[3] = -100 * read[0].mean(dim=0)
        read.clear()
        captured = capture(
            CurrentBlock(block, 0, inputs, Scratch()), ["mlp.experts.0.down_proj", "mlp.experts.3.down_proj"]
        )
        expert = block.get_submodule("mlp.experts.3")
        states = torch.cat(read[: len(inputs)])
        activations = torch.nn.functional.silu(expert.gate_proj(states)) * expert.up_proj(states)
    shown = captured["mlp.experts.3.down_proj"]
    assert_close_for_fast_products(shown.gram, activations.T @ activations / len(activations))
    assert not block.get_submodule("mlp.experts")._forward_pre_hooks


def test_an_expert_that_many_tokens_reach_is_known_by_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_statistics, "MIN_EXPERT_TOKENS", 2)
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == "qwen3-moe"), tmp_path)
    block = find_blocks(model).blocks["model.layers.0"]
    read: list[Tensor] = []
    with torch.no_grad():
        inputs = list(embed(find_blocks(model), TOKENS))
        block.get_submodule("mlp.experts.0.down_proj").register_forward_pre_hook(
            lambda _module, arguments: read.append(arguments[0])
        )
        captured = capture(CurrentBlock(block, 0, inputs, Scratch()), ["mlp.experts.0.down_proj"])
    own = torch.cat(read)
    assert 2 <= len(own) < TOKENS.numel()
    assert_close_for_fast_products(captured["mlp.experts.0.down_proj"].gram, own.T @ own / len(own))


def test_of_an_input_that_no_token_reaches_every_channel_counts_the_same() -> None:
    statistics = StatisticsSum(3, HOST).result()
    assert torch.equal(statistics.gram, torch.eye(3))
    assert torch.equal(statistics.mean_magnitude, torch.ones(3))


def rows(chunks: list[BlockInput]) -> Tensor:
    return torch.cat([chunk.hidden.flatten(0, -2) for chunk in chunks])


def test_a_drift_is_what_a_linear_has_to_add_to_put_the_stream_right(tmp_path: Path) -> None:
    # given a block whose inputs have drifted, and which is itself still as it was
    model = open_tiny(VARIANTS[0], tmp_path)
    block = model.get_submodule("model.layers.0")
    with torch.no_grad():
        original = list(embed(find_blocks(model), TOKENS))
        noise = torch.Generator().manual_seed(0)
        current = [
            BlockInput(chunk.hidden + 0.1 * torch.randn(chunk.hidden.shape, generator=noise), chunk.contexts)
            for chunk in original
        ]
        seen = OriginalBlock.run(block, 0, original, ["post_attention_layernorm"], [], Scratch())
        pair = BlockPair(seen, CurrentBlock(block, 0, current, Scratch()))
        even = [torch.ones(chunk.hidden[..., 0].numel()) for chunk in original]
        reads: dict[str, list[Tensor]] = {"original": [], "current": []}
        for side, chunks in (("original", original), ("current", current)):
            hook = block.get_submodule("self_attn.o_proj").register_forward_pre_hook(
                lambda _module, arguments, side=side: reads[side].append(arguments[0].flatten(0, -2))
            )
            for chunk in chunks:
                run_block(block, 0, chunk)
            hook.remove()

        statistics = capture_pair(
            pair,
            {"self_attn.o_proj": "self_attn.o_proj"},
            {"self_attn.o_proj": StreamWriter("post_attention_layernorm", 1.0)},
            [],
            even,
        )

    # then attention's output is to be the original's and the drift of the block's input, over all tokens together
    x, y = torch.cat(reads["original"]), torch.cat(reads["current"])
    assert_close_for_fast_products(statistics.inputs()["self_attn.o_proj"].gram, y.T @ y / len(y))
    moments = statistics.paired["self_attn.o_proj"].moments
    weight = block.get_submodule("self_attn.o_proj").get_parameter("weight").detach()
    wanted = x @ weight.T + rows(original) - rows(current)
    assert_close_for_fast_products(moments.whole.targets["self_attn.o_proj"], wanted.T @ y)
    # and a quarter of them is held out
    held_out = moments.grams.held_out_product(torch.eye(y.shape[1]))
    assert float(held_out.trace() / moments.grams.merge().trace()) == pytest.approx(0.25, abs=0.05)


def test_a_token_counts_by_its_share_of_the_stream() -> None:
    # given three tokens, the first one ten times as large
    states = torch.tensor([[[10.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    (weights,) = relative_weights([BlockInput(states, ())])
    assert float(weights.mean()) == pytest.approx(1.0)
    assert float(weights[1] / weights[0]) == pytest.approx(100.0)
    assert float(weights[1]) == pytest.approx(float(weights[2]))


def test_a_state_of_nothing_does_not_drown_the_others() -> None:
    # given a token whose state is 0, as that of an unused embedding
    states = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    (weights,) = relative_weights([BlockInput(states, ())])
    assert torch.isfinite(weights).all()
    assert float(weights[0] / weights[1]) < 20
