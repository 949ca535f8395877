"""Which linears add to the residual stream, found by trying, over the families' ways to build a block."""

from pathlib import Path

import pytest
import torch
from torch import nn

from quant.capture import embed
from quant.model_structure import find_blocks
from quant.residual import BLOCK, StreamWriter, find_stream_writers
from quant.scale_groups import linear_of
from tests.quant.tiny_families import VARIANTS, open_tiny

TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 256
SEQUENTIAL = {
    "self_attn.o_proj": StreamWriter("post_attention_layernorm", 1.0),
    "mlp.down_proj": StreamWriter(BLOCK, 1.0),
}


def writers_of(name: str, directory: Path) -> dict[str, StreamWriter]:
    model = open_tiny(next(variant for variant in VARIANTS if str(variant) == name), directory)
    stack = find_blocks(model)
    block = next(iter(stack.blocks.values()))
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        found = find_stream_writers(block, 0, next(embed(stack, TOKENS)), linears)
    return {name: StreamWriter(writer.reader, round(writer.multiplier, 3)) for name, writer in found.items()}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3-mha"])
def test_attention_and_mlp_add_to_the_stream_one_after_the_other(name: str, tmp_path: Path) -> None:
    assert writers_of(name, tmp_path) == SEQUENTIAL


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_in_between_makes_none(name: str, tmp_path: Path) -> None:
    assert writers_of(name, tmp_path) == {}


@pytest.mark.parametrize("name", ["cohere", "gpt-neox", "falcon-7b"])
def test_in_a_parallel_block_both_add_to_its_output(name: str, tmp_path: Path) -> None:
    found = writers_of(name, tmp_path)
    assert len(found) == 2
    assert set(found.values()) == {StreamWriter(BLOCK, 1.0)}


def test_a_constant_factor_is_found(tmp_path: Path) -> None:
    assert writers_of("granite", tmp_path) == {
        "self_attn.o_proj": StreamWriter("post_attention_layernorm", 0.3),
        "mlp.down_proj": StreamWriter(BLOCK, 0.3),
    }


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_are_weighted_by_token_and_add_nothing_as_it_is(name: str, tmp_path: Path) -> None:
    assert writers_of(name, tmp_path).keys() == {"self_attn.o_proj"}


def test_the_stream_of_a_post_norm_block_is_what_its_norms_read(tmp_path: Path) -> None:
    assert writers_of("opt-350m", tmp_path) == {
        "self_attn.out_proj": StreamWriter("self_attn_layer_norm", 1.0),
        "fc2": StreamWriter("final_layer_norm", 1.0),
    }


def test_trying_changes_nothing(tmp_path: Path) -> None:
    model = open_tiny(VARIANTS[0], tmp_path)
    stack = find_blocks(model)
    block = next(iter(stack.blocks.values()))
    with torch.no_grad():
        before = model(TOKENS).logits
        find_stream_writers(block, 0, next(embed(stack, TOKENS)), ["mlp.down_proj"])
        assert torch.equal(model(TOKENS).logits, before)
    assert not linear_of(block, "mlp.down_proj")._forward_hooks
