"""A quantized output head: stored by itself, the embedding untouched, and read back by everything that reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kernels.reference import dequantize
from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.reader import CheckpointReader
from quant.convert import convert
from quant.dense_checkpoint import load_dense
from quant.device import HOST
from quant.errors import RecipeError, SourceError
from quant.evaluate import EvalOptions, TextWindows, evaluate_checkpoint
from quant.input_statistics import StatisticsSum
from quant.method import STEPS, Method
from quant.model_plan import HeadPlan
from quant.model_structure import find_head, untie
from quant.output_head import HeadInput, search_head
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.rounding import round_plainly
from quant.scale_search import Grouping
from quant.source import open_source
from tests.quant.blockwise_models import to_blockwise
from tests.quant.test_compressed_checkpoint import assert_transformers_sees_the_same_weights
from tests.tiny_models import save_tiny_model

HEAD, EMBEDDING = "lm_head", "model.embed_tokens.weight"
PLAIN = Recipe(method=Method.RTN, num_windows=0, lm_head=8)
SEARCHED = Recipe(num_samples=6, sample_tokens=48, num_windows=0, lm_head=4)
# llama's head is tied to its embedding, mistral's is its own
MODEL_TYPES = ("llama", "mistral")


def original_head(model: Path) -> torch.Tensor:
    dense: torch.Tensor = AutoModelForCausalLM.from_pretrained(model).get_output_embeddings().weight.detach()
    return dense


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_head_is_rounded_and_the_embedding_is_not(model_type: str, bits: int, tmp_path: Path) -> None:
    model = save_tiny_model(model_type, tmp_path / "model")
    embedding = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight.detach()

    quantize(replace(PLAIN, lm_head=bits), model, tmp_path / "out")

    reader = CheckpointReader.open(tmp_path / "out")
    rounded = round_plainly(original_head(model), 64, bits)
    assert torch.equal(dequantize(reader.read_packed(HEAD)), rounded)
    assert torch.equal(reader.read_tensor(EMBEDDING), embedding.half())
    assert f"{HEAD}.weight" not in reader.tensor_names
    # a loader that ties would put the embedding in its place
    assert reader.config["tie_word_embeddings"] is False
    dense = load_dense(tmp_path / "out")
    assert torch.equal(dense.get_parameter(f"{HEAD}.weight").detach(), rounded)
    assert torch.equal(dense.get_parameter(EMBEDDING).detach(), embedding.half().float())


@pytest.mark.parametrize("method", [Method.GPTQ, Method.AWQ, Method.AWQ_GPTQ])
def test_every_method_loses_less_than_plain_rounding_on_what_the_head_reads(method: Method, tmp_path: Path) -> None:
    source = open_source(save_tiny_model("llama", tmp_path / "model"))
    tokens = torch.arange(6 * 48).view(6, 48) * 11 % 256
    read = StatisticsSum(64, HOST)
    hook = source.model.get_submodule(HEAD).register_forward_pre_hook(
        lambda _module, inputs: read.add(inputs[0].flatten(0, 1), torch.ones(tokens.numel()))
    )
    with torch.no_grad():
        source.model(tokens)
        hook.remove()
        before = original_head(tmp_path / "model")
        # block by block, as the walk does it with blocks that are quantized
        model = to_blockwise(source.model)
        head_input = HeadInput(model, tokens)
        for index in range(2):
            head_input.follow(model.load_block(index), index)
        seen = head_input.statistics(model, HEAD).gram
        packed, loss = search_head(before, HeadPlan(HEAD, Grouping(4, 32)), STEPS[method], seen)

    # measured by hand on the states that the norm gives
    gram = read.result().gram
    torch.testing.assert_close(seen, gram)
    searched, plain = (before - new for new in (dequantize(packed), round_plainly(before, 32, 4)))
    signal = torch.trace(before @ gram @ before.T)
    assert loss.chosen == pytest.approx(float(torch.trace(searched @ gram @ searched.T) / signal), rel=1e-3)
    assert loss.plain == pytest.approx(float(torch.trace(plain @ gram @ plain.T) / signal), rel=1e-3)
    assert loss.chosen < 0.95 * loss.plain


def test_the_report_has_the_heads_error_and_counts_its_bits_apart(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    report = quantize(SEARCHED, model, tmp_path / "out")
    assert report.layers[-1].name == HEAD
    assert report.layers[-1].chosen <= report.layers[-1].plain
    assert report.bits_per_weight == pytest.approx(4 + 20 / 64)
    assert quantize(replace(SEARCHED, lm_head=8), model, tmp_path / "8").bits_per_weight == report.bits_per_weight


def test_what_was_measured_is_what_was_written(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")
    report = quantize(replace(SEARCHED, num_windows=1), model, tmp_path / "out")
    assert report.held_out is not None
    rows = evaluate_checkpoint(EvalOptions(tmp_path / "out", windows=TextWindows(num_windows=1))).rows
    assert rows[-1].perplexity == pytest.approx(report.held_out.perplexity, rel=1e-3)
    # plain rounding of the head stands beside it, and leaves the embedding alone
    assert rows[1].mean_kl is not None
    assert rows[1].mean_kl < 1


def test_four_bits_are_an_awq_file_that_says_that_its_head_is_quantized(tmp_path: Path) -> None:
    quantize(replace(PLAIN, lm_head=4), save_tiny_model("llama", tmp_path / "model"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["lm_head"], config["modules_to_not_convert"]) == ("awq", True, [])


@pytest.mark.parametrize(("bits", "head"), [(4, 8), (8, 8), (3, 4)])
def test_other_bits_are_compressed_tensors_that_transformers_reads(bits: int, head: int, tmp_path: Path) -> None:
    recipe = replace(PLAIN, bits=bits, lm_head=head)
    quantize(recipe, save_tiny_model("llama", tmp_path / "model"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert HEAD not in config["ignore"]
    if bits == head:
        # it reads all modules of a checkpoint with one scheme
        assert_transformers_sees_the_same_weights(tmp_path / "out")


def test_a_conversion_keeps_the_head_and_what_is_said_of_it(tmp_path: Path) -> None:
    recipe = replace(PLAIN, lm_head=4, format=OutputFormat.COMPRESSED_TENSORS)
    quantize(recipe, save_tiny_model("llama", tmp_path / "model"), tmp_path / "out")

    reader = convert(tmp_path / "out", tmp_path / "awq", OutputFormat.AWQ)

    assert HEAD in reader.quantized_module_names
    assert reader.config["quantization_config"]["lm_head"] is True


def test_a_head_may_have_one_scale_a_row(tmp_path: Path) -> None:
    recipe = replace(PLAIN, group_size=WHOLE_ROW)
    quantize(recipe, save_tiny_model("mistral", tmp_path / "model"), tmp_path / "out")
    assert CheckpointReader.open(tmp_path / "out").packed_spec(HEAD).is_whole_row


def test_the_head_of_another_name_is_found(tmp_path: Path) -> None:
    overrides = {"tie_word_embeddings": False}
    model = save_tiny_model("gpt_neox", tmp_path / "model", config_overrides=overrides)
    quantize(PLAIN, model, tmp_path / "out")
    reader = CheckpointReader.open(tmp_path / "out")
    assert "embed_out" in reader.quantized_module_names
    rounded = round_plainly(original_head(model), 64, 8)
    assert torch.equal(load_dense(tmp_path / "out").get_output_embeddings().weight.detach(), rounded)


def test_a_group_size_that_does_not_divide_the_heads_inputs_names_it(tmp_path: Path) -> None:
    # given OPT-350m, whose head reads fewer channels than its blocks
    narrow = {"word_embed_proj_dim": 48, "ffn_dim": 128, "do_layer_norm_before": False, "dropout": 0.0}
    model = save_tiny_model("opt", tmp_path / "model", config_overrides=narrow)
    with pytest.raises(RecipeError, match=r"32 does not divide the 48 in features of lm_head"):
        quantize(PLAIN, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    source = open_source(save_tiny_model("llama", tmp_path / "model"))
    source.model.set_submodule(HEAD, torch.nn.Identity())
    with pytest.raises(SourceError, match="'llama' has no output head that is a linear layer; leave out --lm-head"):
        find_head(source.model)


def test_untying_keeps_the_values_and_ends_the_sharing(tmp_path: Path) -> None:
    model = open_source(save_tiny_model("llama", tmp_path / "model")).model
    untie(model, HEAD)
    head, embedding = model.get_parameter(f"{HEAD}.weight"), model.get_parameter(EMBEDDING)
    assert torch.equal(head, embedding)
    assert head is not embedding
