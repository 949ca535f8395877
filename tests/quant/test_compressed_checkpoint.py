"""Whole checkpoints in the compressed-tensors format: transformers, with the package of that name, sees our weights."""

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from kernels.layout import pack
from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.dense_checkpoint import load_dense
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.rounding import codes_of, full_range, grid_of
from quant.source import open_source
from tests.tiny_models import save_tiny_model

COMPRESSED = OutputFormat.COMPRESSED_TENSORS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("source") / "model")


def assert_transformers_sees_the_same_weights(checkpoint: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    ours = dict(load_dense(checkpoint).named_parameters())
    seen = dict(theirs.named_parameters())
    assert seen.keys() == ours.keys()
    for name, parameter in ours.items():
        assert torch.equal(seen[name], parameter.half()), name


@pytest.mark.parametrize(("bits", "group_size"), [(3, 32), (3, WHOLE_ROW), (4, 64), (8, 32), (8, WHOLE_ROW)])
def test_what_is_quantized_loads_in_transformers_to_the_bit(
    model: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    recipe = Recipe(method=Method.RTN, num_windows=0, bits=bits, group_size=group_size, format=COMPRESSED)

    quantize(recipe, model, tmp_path / "out")

    assert_transformers_sees_the_same_weights(tmp_path / "out")


def test_modules_of_different_bits_and_groups_are_each_read_by_their_own_config_group(
    model: Path, tmp_path: Path
) -> None:
    # given a model whose down projections keep 8 bits, whose values have one scale a row, and whose rest has 3 bits
    source = open_source(model)
    with CheckpointWriter(tmp_path / "out", expected_bytes=0, output_format=COMPRESSED) as writer:
        for name, parameter in source.model.named_parameters():
            weight = parameter.detach()
            if not name.endswith("_proj.weight"):
                writer.add_tensor(name, weight.half())
                continue
            bits, group_size = (8, 32) if "down" in name else (3, WHOLE_ROW if "v_proj" in name else 32)
            grid = grid_of(full_range(weight, group_size), bits)
            writer.add_packed(name.removesuffix(".weight"), pack(codes_of(weight, grid, bits)))
        config = source.checkpoint_config(torch.float16)
        config["quantization_config"] = writer.quantization_config(("lm_head",))
        writer.commit(config, {})

    # when the package finds each module's scheme in the config and decompresses the module with it
    reader = CheckpointReader.open(tmp_path / "out")
    schemes = QuantizationConfig.model_validate(reader.config["quantization_config"])
    assert len(schemes.config_groups) == 3
    dense = load_dense(tmp_path / "out")
    for name in reader.quantized_module_names:
        (scheme,) = (
            scheme
            for scheme in schemes.config_groups.values()
            if is_match(name, dense.get_submodule(name), scheme.targets, schemes.ignore)
        )
        stored = {x.rpartition(".")[2]: reader.read_tensor(x) for x in reader.packed_tensor_names(name)}
        seen = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]

        # then it sees what we do, and so does the reader, who asks the tensors alone
        assert torch.equal(seen, dense.get_parameter(f"{name}.weight").half()), name
    specs = {name.rpartition(".")[2]: reader.packed_spec(name) for name in reader.quantized_module_names}
    assert (specs["down_proj"].bits, specs["down_proj"].group_size) == (8, 32)
    assert (specs["v_proj"].bits, specs["v_proj"].group_size) == (3, 64)
    assert (specs["q_proj"].bits, specs["q_proj"].group_size) == (3, 32)


@pytest.mark.parametrize(("bits", "expected"), [(3, "compressed-tensors"), (4, "awq"), (8, "compressed-tensors")])
def test_the_format_follows_from_the_bits_where_none_is_asked_for(
    model: Path, tmp_path: Path, bits: int, expected: str
) -> None:
    quantize(Recipe(method=Method.RTN, num_windows=0, bits=bits), model, tmp_path / "out")

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == expected


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_search_beats_plain_rounding_at_all_bits(model: Path, tmp_path: Path, bits: int) -> None:
    report = quantize(Recipe(num_samples=4, sample_tokens=32, num_windows=0, bits=bits), model, tmp_path / "out")

    assert sum(layer.chosen for layer in report.layers) < sum(layer.plain for layer in report.layers)


def test_outputs_that_fill_no_awq_word_fit_the_other_format(tmp_path: Path) -> None:
    narrow = {"head_dim": 12, "num_attention_heads": 8, "num_key_value_heads": 1}
    original = save_tiny_model("llama", tmp_path / "model", config_overrides=narrow)
    recipe = Recipe(method=Method.RTN, num_windows=0, group_size=32, format=COMPRESSED)

    quantize(recipe, original, tmp_path / "out")

    assert_transformers_sees_the_same_weights(tmp_path / "out")
