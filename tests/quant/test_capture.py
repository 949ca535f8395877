"""Capture: what the linears of a block read, without changing what the model computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant import capture as capture_module
from quant.capture import embed, observe, run_block, split_sequences
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
    # a sequence, then chunks of two; sliding windows are shorter than a sequence
    monkeypatch.setattr(capture_module, "FIRST_CHUNK_TOKENS", 40)
    monkeypatch.setattr(capture_module, "CHUNK_TOKENS", 80)
    model = open_tiny(variant, tmp_path)
    stack = find_blocks(model)
    states: list[Tensor] = []
    last = list(stack.blocks.values())[-1]
    last.register_forward_hook(lambda _module, _arguments, output: states.append(output))
    with torch.no_grad():
        model(TOKENS)
        expected = states[0][0] if isinstance(states[0], tuple) else states[0]
        inputs = list(embed(stack, TOKENS))
        assert [len(chunk.hidden) for chunk in inputs] == [1, 2, 2]
        for index, block in enumerate(stack.blocks.values()):
            inputs = [run_block(block, index, chunk) for chunk in inputs]
    torch.testing.assert_close(torch.cat([chunk.hidden for chunk in inputs]), expected)


@pytest.mark.parametrize(
    ("num_sequences", "num_tokens", "width", "sizes"),
    [
        (1, 2048, 64, [1]),
        (4, 256, 64, [2, 2]),
        (32, 512, 1024, [1, 4, 4, 4, 4, 4, 4, 4, 3]),
        (3, 4096, 64, [1, 1, 1]),
        # 8 MiB of float32
        (9, 128, 8192, [4, 2, 2, 1]),
    ],
)
def test_sequences_are_split_into_a_small_sample_and_chunks_that_fill_the_cores(
    num_sequences: int, num_tokens: int, width: int, sizes: list[int]
) -> None:
    token_ids = torch.arange(num_sequences * num_tokens).view(num_sequences, num_tokens)
    chunks = split_sequences(token_ids, width)
    assert [len(chunk) for chunk in chunks] == sizes
    assert torch.equal(torch.cat(chunks), token_ids)


def test_modules_are_observed_without_leaving_a_hook_or_running_on(tmp_path: Path) -> None:
    model = llama(tmp_path)
    block = model.get_submodule("model.layers.0")
    ran: list[str] = []
    with torch.no_grad():
        chunk = next(embed(find_blocks(model), TOKENS[:1]))
        block.get_submodule("mlp").register_forward_hook(lambda *_: ran.append("mlp"))
        seen = observe(block, 0, chunk, ["self_attn.o_proj"], ["self_attn.o_proj"])
    projected = block.get_submodule("self_attn.o_proj")(seen.inputs["self_attn.o_proj"])
    torch.testing.assert_close(seen.outputs["self_attn.o_proj"], projected)
    assert not ran
    assert not block.get_submodule("self_attn.o_proj")._forward_pre_hooks
    assert not block.get_submodule("self_attn.o_proj")._forward_hooks


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
        list(embed(replace(stack, decoder=Doubling()), TOKENS))
