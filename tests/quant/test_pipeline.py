"""A whole quantization of tiny models: what is written loads, is close to the original, and beats plain rounding."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kernels.reference import dequantize
from quant.checkpoint.reader import CheckpointReader
from quant.dense_checkpoint import load_dense
from quant.errors import OutputError, QuantizationError, RecipeError, SourceError
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.report import REPORT_FILE
from tests.quant.tiny_families import VARIANTS
from tests.tiny_models import TINY_MODEL_TYPES, save_tiny_model

# of so short a text, written by random weights, some leave nothing to gain: seeds differ by a sixth in divergence
AWQ = Recipe(method=Method.AWQ, num_samples=6, sample_tokens=48, num_windows=0, seed=1)
# what is fitted to the text needs more of it
AWQ_GPTQ = Recipe(method=Method.AWQ_GPTQ, num_samples=64, sample_tokens=64, num_windows=0, seed=1)
RTN = Recipe(method=Method.RTN, num_windows=0)
TOKENS = torch.arange(3 * 40).view(3, 40) * 11 % 256


def dequantized_model(original: Path, checkpoint: Path) -> PreTrainedModel:
    """The original with every parameter taken from the checkpoint; the packed ones dequantized."""
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    reader = CheckpointReader.open(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            module_name = name.removesuffix(".weight")
            if reader.is_quantized(module_name):
                parameter.copy_(dequantize(reader.read_packed(module_name)))
            else:
                parameter.copy_(reader.read_tensor(name))
    return model


def divergence(model: PreTrainedModel, original: PreTrainedModel) -> float:
    with torch.no_grad():
        log_p, log_q = (candidate(TOKENS).logits.log_softmax(dim=-1) for candidate in (original, model))
    return float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / TOKENS.numel())


@pytest.mark.parametrize("recipe", [AWQ, AWQ_GPTQ], ids=lambda recipe: recipe.method.value)
@pytest.mark.parametrize("model_type", TINY_MODEL_TYPES)
def test_the_written_model_is_closer_to_the_original_than_plain_rounding(
    model_type: str, recipe: Recipe, tmp_path: Path
) -> None:
    original = save_tiny_model(model_type, tmp_path / "model")
    report = quantize(recipe, original, tmp_path / "awq")
    quantize(RTN, original, tmp_path / "rtn")
    reference = AutoModelForCausalLM.from_pretrained(original).eval()
    searched = divergence(dequantized_model(original, tmp_path / "awq"), reference)
    plain = divergence(dequantized_model(original, tmp_path / "rtn"), reference)
    assert searched < plain
    assert len(report.layers) == 2 * 7
    for layer in report.layers:
        assert layer.chosen <= layer.plain, layer.name


def test_the_checkpoint_is_complete(tmp_path: Path) -> None:
    original = save_tiny_model("llama", tmp_path / "model")
    report = quantize(replace(AWQ, num_windows=1), original, tmp_path / "awq")
    config = json.loads((tmp_path / "awq" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 64,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config["model_type"] == "llama"
    assert config["dtype"] == "float16"
    reader = CheckpointReader.open(tmp_path / "awq")
    assert len(reader.quantized_module_names) == 14
    assert "lm_head.weight" not in reader.tensor_names
    assert reader.dtype("model.embed_tokens.weight") == torch.float16
    assert AutoTokenizer.from_pretrained(tmp_path / "awq").chat_template
    assert (tmp_path / "awq" / "generation_config.json").exists()
    assert json.loads((tmp_path / "awq" / REPORT_FILE).read_text()) == json.loads(json.dumps(report.to_json()))
    assert report.held_out is not None
    assert report.calibration is not None
    assert report.calibration.num_tokens == 6 * 48


def test_an_untied_head_is_kept_in_half_precision(tmp_path: Path) -> None:
    original = save_tiny_model("qwen3", tmp_path / "model")
    quantize(RTN, original, tmp_path / "rtn")
    head = CheckpointReader.open(tmp_path / "rtn").read_tensor("lm_head.weight")
    expected = AutoModelForCausalLM.from_pretrained(original).get_parameter("lm_head.weight").detach().half()
    assert torch.equal(head, expected)


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    original = save_tiny_model("llama", tmp_path / "model")
    for name in ("one", "two"):
        quantize(AWQ, original, tmp_path / name)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    original = save_tiny_model("llama", tmp_path / "model")
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values"):
        quantize(AWQ, original, tmp_path / "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    original = save_tiny_model("qwen3", tmp_path / "model")
    tensors = load_file(original / "model.safetensors")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantizationError, match=r"lm_head\.weight as torch\.float16"):
        quantize(RTN, original, tmp_path / "rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_group_size_that_does_not_divide_is_refused_by_layer_name(tmp_path: Path) -> None:
    original = save_tiny_model("llama", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"128 does not divide the 64 in features of model\.layers\.0\.self_attn\.q"):
        quantize(Recipe(group_size=128), original, tmp_path / "awq")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_outputs_that_fill_no_words_are_refused_by_layer_name(tmp_path: Path) -> None:
    narrow = {"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 1}
    original = save_tiny_model("llama", tmp_path / "model", config_overrides=narrow)
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.self_attn\.k_proj has 4 outputs"):
        quantize(RTN, original, tmp_path / "rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_of_its_own_is_kept_where_the_config_calls_it_tied(tmp_path: Path) -> None:
    original = save_tiny_model("llama", tmp_path / "model", config_overrides={"tie_word_embeddings": False})
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    quantize(RTN, original, tmp_path / "rtn")
    assert json.loads((tmp_path / "rtn" / "config.json").read_text())["tie_word_embeddings"] is False
    dense = load_dense(tmp_path / "rtn")
    head = load_file(original / "model.safetensors")["lm_head.weight"].half().float()
    assert torch.equal(dense.get_parameter("lm_head.weight").detach(), head)


def test_missing_calibration_text_is_told_before_the_model_is_opened(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"missing\.txt is no file"):
        quantize(replace(AWQ, calibration="missing.txt"), tmp_path / "no-model", tmp_path / "awq")


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file is no directory"):
        quantize(AWQ, tmp_path / "no-model", tmp_path / "file" / "awq")


def test_an_output_that_exists_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "awq").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        quantize(AWQ, tmp_path / "no-model", tmp_path / "awq")


def test_a_quantized_model_is_no_source(tmp_path: Path) -> None:
    quantize(RTN, save_tiny_model("llama", tmp_path / "model"), tmp_path / "rtn")
    with pytest.raises(SourceError, match="quantized already"):
        quantize(RTN, tmp_path / "rtn", tmp_path / "again")


def test_a_model_with_a_short_context_is_calibrated_and_measured_within_it(tmp_path: Path) -> None:
    # given learned positions, of which there are 40 and no more
    overrides = {**next(variant.fields for variant in VARIANTS if variant.name == "opt"), "max_position_embeddings": 40}
    original = save_tiny_model("opt", tmp_path / "model", config_overrides=overrides)

    report = quantize(Recipe(num_samples=4), original, tmp_path / "awq")

    assert report.recipe.sample_tokens == 40
    assert report.calibration is not None
    assert report.calibration.num_tokens == 4 * 40
    assert report.held_out is not None
    assert report.held_out.window_tokens == 40
