"""Converting changes the format and nothing else: the same codes, scales and zero points, and every other file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from kernels.layout import PackedWeight, unpack
from quant.checkpoint.folded_scales import (
    FOLDED_SCALES_FILE,
    ModuleScales,
    encode_folded_scales,
    read_folded_scales,
)
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.writer import CheckpointWriter
from quant.cli import app
from quant.convert import convert
from quant.errors import CheckpointError, OutputError, QuantizationError, RecipeError
from tests.quant.checkpoint.stored_modules import assert_same_weight, random_weight
from tests.quant.checkpoint.test_awq_gemv import PACKERS
from tests.quant.checkpoint.test_gptq import pack_v2

AWQ, COMPRESSED = OutputFormat.AWQ, OutputFormat.COMPRESSED_TENSORS
FIRST, SECOND = "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"
SIDE_FILES = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ x }}", "README.md": b"# card", "modeling.py": b"1"}
# settings of the source's format, weights in another one, and what is not the model's
LEFT_BEHIND = dict.fromkeys(
    ("quantize_config.json", "quant_config.json", "quantization_config.json", "pytorch_model.bin", ".hidden"), b"{}"
)
Weights = dict[str, PackedWeight]


def plain_tensors() -> dict[str, Tensor]:
    return {
        f"{FIRST}.bias": torch.ones(32).half(),
        "model.embed_tokens.weight": torch.arange(320).reshape(10, 32).bfloat16(),
        "model.norm.weight": torch.rand(32, generator=torch.Generator().manual_seed(0)),
    }


def two_weights(**kinds: object) -> Weights:
    return {name: random_weight(32, 128, 64, seed, **kinds) for seed, name in enumerate((FIRST, SECOND))}  # type: ignore[arg-type]


def save_written(directory: Path, weights: Weights, output_format: OutputFormat) -> Path:
    """A checkpoint by our writer, with side files."""
    with CheckpointWriter(directory, expected_bytes=0, output_format=output_format) as writer:
        for name, weight in weights.items():
            writer.add_packed(name, weight)
        for name, tensor in plain_tensors().items():
            writer.add_tensor(name, tensor)
        config = {"model_type": "llama", "a_field": 1, "quantization_config": writer.quantization_config(())}
        writer.commit(config, SIDE_FILES)
    return directory


def save_foreign(
    directory: Path, weights: Weights, fields: dict[str, object], pack: Callable[[PackedWeight], dict[str, Tensor]]
) -> Path:
    """A checkpoint as another tool writes it, with its old settings file, an index of one shard, and a pickle."""
    directory.mkdir()
    tensors = plain_tensors()
    for name, weight in weights.items():
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in pack(weight).items()}
    save_file(tensors, directory / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": fields}))
    for name, content in {**SIDE_FILES, **LEFT_BEHIND}.items():
        (directory / name).write_bytes(content)
    return directory


def assert_holds(directory: Path, weights: Weights, *more_files: str) -> None:
    """All weights, all plain tensors and all side files, exactly. more_files: what is there besides."""
    reader = CheckpointReader.open(directory)
    assert set(reader.quantized_module_names) == set(weights)
    for name, weight in weights.items():
        assert_same_weight(reader.read_packed(name), weight)
    for name, tensor in plain_tensors().items():
        assert torch.equal(reader.read_tensor(name), tensor)
        assert reader.dtype(name) == tensor.dtype
    packed = {x for name in weights for x in reader.packed_tensor_names(name)}
    assert set(reader.tensor_names) - packed == set(plain_tensors())
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.json", "model.safetensors", *SIDE_FILES, *more_files}
    for name, content in SIDE_FILES.items():
        assert (directory / name).read_bytes() == content


def test_there_and_back_gives_the_same_checkpoint(tmp_path: Path) -> None:
    weights = two_weights()
    source = save_written(tmp_path / "awq", weights, AWQ)

    convert(source, tmp_path / "compressed", COMPRESSED)
    convert(tmp_path / "compressed", tmp_path / "back", AWQ)

    assert_holds(tmp_path / "compressed", weights)
    assert_holds(tmp_path / "back", weights)
    original, back = (json.loads((x / "config.json").read_text()) for x in (source, tmp_path / "back"))
    assert back["a_field"] == 1
    kept = {"modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    assert back["quantization_config"] == {**original["quantization_config"], **kept}


def test_every_module_that_stays_dense_is_named_to_loaders_that_quantize_all_linears(tmp_path: Path) -> None:
    source = save_written(tmp_path / "awq", two_weights(), AWQ)

    convert(source, tmp_path / "compressed", COMPRESSED)

    fields = json.loads((tmp_path / "compressed" / "config.json").read_text())["quantization_config"]
    assert fields["ignore"] == ["model.embed_tokens", "lm_head"]
    assert fields["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_the_scales_that_are_folded_in_go_along(tmp_path: Path) -> None:
    source = save_written(tmp_path / "awq", two_weights(), AWQ)
    scales = encode_folded_scales({FIRST: ModuleScales(torch.rand(128) + 0.5, torch.rand(32) + 0.5)})
    (source / FOLDED_SCALES_FILE).write_bytes(scales)

    convert(source, tmp_path / "out", COMPRESSED)

    assert_holds(tmp_path / "out", two_weights(), FOLDED_SCALES_FILE)
    assert (tmp_path / "out" / FOLDED_SCALES_FILE).read_bytes() == scales


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_becomes_compressed_tensors(tmp_path: Path, bits: int) -> None:
    weights = two_weights(bits=bits)
    fields: dict[str, object] = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": bits, "group_size": 64}
    source = save_foreign(tmp_path / "gptq", weights, fields, pack_v2)

    convert(source, tmp_path / "out", COMPRESSED)

    # and it says what its new format leaves open: that no scales are folded in
    assert_holds(tmp_path / "out", weights, FOLDED_SCALES_FILE)
    assert read_folded_scales(tmp_path / "out") == {}


@pytest.mark.parametrize("stored_as", PACKERS)
def test_the_layouts_of_autoawq_become_gemm(tmp_path: Path, stored_as: str) -> None:
    weights = two_weights()
    version = stored_as.rpartition(" ")[2]
    fields: dict[str, object] = {"quant_method": "awq", "version": version, "bits": 4, "group_size": 64}
    source = save_foreign(tmp_path / version, weights, fields, lambda weight: PACKERS[stored_as](weight, 2))  # type: ignore[index]

    convert(source, tmp_path / "out", AWQ)

    assert_holds(tmp_path / "out", weights)


def test_modules_of_different_kinds_stay_different(tmp_path: Path) -> None:
    weights = {FIRST: random_weight(32, 128, 64, bits=3), SECOND: random_weight(32, 128, 128, bits=8)}
    source = save_written(tmp_path / "mixed", weights, COMPRESSED)

    convert(source, tmp_path / "out", COMPRESSED)

    assert_holds(tmp_path / "out", weights)


def test_a_config_nested_under_text_config_moves_to_the_top(tmp_path: Path) -> None:
    source = save_written(tmp_path / "awq", two_weights(), AWQ)
    config = json.loads((source / "config.json").read_text())
    nested = {"text_config": {"quantization_config": config.pop("quantization_config"), "b": 2}}
    (source / "config.json").write_text(json.dumps({**config, **nested}))

    convert(source, tmp_path / "out", COMPRESSED)

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {"b": 2}
    assert written["quantization_config"]["quant_method"] == "compressed-tensors"


def test_bfloat16_scales_become_float16_where_that_is_exact(tmp_path: Path) -> None:
    weights = two_weights(scale_dtype=torch.bfloat16)
    source = save_written(tmp_path / "compressed", weights, COMPRESSED)

    converted = convert(source, tmp_path / "out", AWQ)

    for name, weight in weights.items():
        read = converted.read_packed(name)
        assert read.scales.dtype == torch.float16
        assert torch.equal(read.scales.float(), weight.scales.float())
        assert torch.equal(unpack(read).codes, unpack(weight).codes)


def test_a_scale_that_would_change_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    weights = two_weights(scale_dtype=torch.bfloat16)
    weights[SECOND].scales[3, 1] = 1e-30
    source = save_written(tmp_path / "compressed", weights, COMPRESSED)

    with pytest.raises(QuantizationError, match=rf"{SECOND}: scales .* float16 exactly.*--format compressed-tensors"):
        convert(source, tmp_path / "out", AWQ)
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({FIRST: random_weight(32, 128, 64, bits=3)}, "down_proj has 3-bit weights, and the AWQ gemm format holds 4"),
        ({FIRST: random_weight(32, 128, 64, bits=8)}, "down_proj has 8-bit weights"),
        ({FIRST: random_weight(12, 128, 64)}, "down_proj has 12 outputs, and the AWQ gemm format packs 8"),
        (
            {FIRST: random_weight(32, 128, 64), SECOND: random_weight(32, 128, 32)},
            "modules have groups of 32, 64, and the AWQ gemm format has one group size for all",
        ),
    ],
)
def test_what_awq_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, weights: Weights, message: str
) -> None:
    source = save_written(tmp_path / "compressed", weights, COMPRESSED)

    with pytest.raises(RecipeError, match=rf"{message}.*; use --format compressed-tensors"):
        convert(source, tmp_path / "out", AWQ)
    assert [path.name for path in tmp_path.iterdir()] == ["compressed"]


def test_an_unquantized_model_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file(plain_tensors(), source / "model.safetensors")

    with pytest.raises(CheckpointError, match="has no quantized modules; `awq-serve quantize` makes"):
        convert(source, tmp_path / "out", AWQ)


def test_an_output_that_exists_is_refused(tmp_path: Path) -> None:
    source = save_written(tmp_path / "awq", two_weights(), AWQ)

    with pytest.raises(OutputError, match="awq exists already"):
        convert(source, source, COMPRESSED)


def test_progress_counts_tensors_and_modules(tmp_path: Path) -> None:
    source = save_written(tmp_path / "awq", two_weights(), AWQ)
    heard: list[tuple[str, int, int]] = []

    convert(source, tmp_path / "out", COMPRESSED, lambda phase, done, total, _: heard.append((phase, done, total)))

    assert heard == [("convert", done, 5) for done in range(6)]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["convert", *arguments])


def test_the_command_converts_and_says_what_it_wrote(tmp_path: Path) -> None:
    source = save_written(tmp_path / "awq", two_weights(), AWQ)

    result = invoke(str(source), str(tmp_path / "out"), "--format", "compressed-tensors")

    assert result.exit_code == 0, result.output
    assert f"2 quantized modules written to {tmp_path / 'out'}" in result.stdout
    assert_holds(tmp_path / "out", two_weights())


def test_the_command_refuses_in_one_sentence_with_code_2(tmp_path: Path) -> None:
    source = save_written(tmp_path / "ct", {FIRST: random_weight(32, 128, 64, bits=3)}, COMPRESSED)

    result = invoke(str(source), str(tmp_path / "out"), "--format", "awq")

    assert result.exit_code == 2
    assert "3-bit weights" in result.stderr
