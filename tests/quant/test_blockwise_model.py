"""A model that is read block by block has no weight, and gives what the whole model gives."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quant.capture import embed, run_block
from quant.device import HOST
from quant.model_structure import find_blocks
from quant.original_weights import HeldWeights
from quant.pipeline import quantize
from quant.progress import ignore_notice
from quant.recipe import Method, Recipe
from quant.source import open_source, open_streamed
from tests.quant.blockwise_models import to_blockwise
from tests.quant.tiny_families import TOKENS, VARIANTS, open_tiny
from tests.tiny_models import save_tiny_model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_blocks_and_what_is_around_them_give_the_logits_of_the_whole_model(variant: object, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = open_tiny(variant, tmp_path)(TOKENS).logits
        _, model = open_streamed(tmp_path, ignore_notice)
        (chunk,) = model.embed(TOKENS)
        for index in range(2):
            chunk = run_block(model.load_block(index), index, chunk)
        logits = model.run_outer(TOKENS, chunk.hidden)
    torch.testing.assert_close(logits, expected)


def test_no_weight_stays_behind(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    source, model = open_streamed(tmp_path, ignore_notice)
    with torch.no_grad():
        (chunk,) = model.embed(TOKENS)
        model.run_outer(TOKENS, run_block(model.load_block(0), 0, chunk).hidden)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.model.modules())
    # what no checkpoint holds is there: nobody would read it again
    assert not source.model.get_buffer("model.rotary_emb.inv_freq").is_meta


def test_the_states_that_enter_the_blocks_are_bit_for_bit_those_of_the_whole_model(tmp_path: Path) -> None:
    whole = open_tiny(VARIANTS[0], tmp_path)
    _, model = open_streamed(tmp_path, ignore_notice)
    with torch.no_grad():
        (expected,), (chunk,) = embed(find_blocks(whole), TOKENS), model.embed(TOKENS)
    assert torch.equal(chunk.hidden, expected.hidden)


def test_a_block_is_the_callers_own(tmp_path: Path) -> None:
    for model in (
        to_blockwise(open_source(save_tiny_model("llama", tmp_path)).model),
        open_streamed(tmp_path, ignore_notice)[1],
    ):
        first = model.load_block(0)
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.zero_()
        assert all(bool(parameter.any()) for parameter in model.load_block(0).parameters())


def test_tied_weights_stay_tied_in_a_whole_copy(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path, dtype=torch.bfloat16)
    _, model = open_streamed(tmp_path, ignore_notice)
    whole = model.load_whole(torch.bfloat16, HOST)
    assert whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)(TOKENS).logits
        assert torch.equal(whole(TOKENS).logits, expected)


def shard(model: Path, max_shard_size: str) -> None:
    """Save the model again, in several files."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size=max_shard_size)


@pytest.mark.parametrize("method", [Method.RTN, Method.AWQ_GPTQ])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_checkpoint_has_the_same_bytes_as_if_the_model_had_been_loaded_whole(
    name: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a model in several files
    variant = next(variant for variant in VARIANTS if variant.name == name)
    model = save_tiny_model(variant.model_type, tmp_path / "model", config_overrides=variant.fields)
    shard(model, "60KB")
    assert len(list(model.glob("*.safetensors"))) > 3
    (tmp_path / "text.txt").write_text("The river rises in the hills. " * 40)
    text = f"{tmp_path / 'text.txt'}:1"
    recipe = Recipe(calibration=text, num_samples=4, sample_tokens=32).with_method(method)

    # when it is read block by block, and when its tensors are said to lie in another layout
    quantize(recipe, model, tmp_path / "streamed")
    monkeypatch.setattr("quant.source.find_stored", lambda _model, _files: None)
    notices: list[str] = []
    quantize(recipe, model, tmp_path / "whole", on_notice=notices.append)

    assert any("is held in memory whole, 4 bytes a parameter" in notice for notice in notices)
    streamed, whole = (
        {
            file.name: file.read_bytes()
            for file in (tmp_path / out).iterdir()
            if file.suffix in (".safetensors", ".json")
        }
        for out in ("streamed", "whole")
    )
    del streamed["report.json"], whole["report.json"]
    assert streamed == whole


def test_a_model_in_another_layout_is_held_whole(tmp_path: Path) -> None:
    # given files of the decoder alone, without the name of the model around it
    save_tiny_model("llama", tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in expected.items()}
    save_file(short, tmp_path / "model.safetensors", metadata={"format": "pt"})

    _, model = open_streamed(tmp_path, ignore_notice)

    assert isinstance(model.weights, HeldWeights)
    name = "mlp.up_proj.weight"
    assert torch.equal(model.load_block(1).get_parameter(name), expected[f"model.layers.1.{name}"])
