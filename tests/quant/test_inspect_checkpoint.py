"""What inspect says of a checkpoint is what its files hold."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from typer.testing import CliRunner

from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, ModuleScales, encode_folded_scales
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.writer import CheckpointWriter
from quant.cli import app
from quant.errors import CheckpointError
from quant.inspect_checkpoint import PlainTensor, QuantizedModule, inspect_checkpoint
from quant.report import LayerLoss
from quant.salience import ChannelErrors, Salience
from tests.quant.checkpoint.stored_modules import random_weight

SALIENCE = Salience((5, 40, 1, 2, 3, 4), ChannelErrors(0.5, 0.125), ChannelErrors(0.02, 0.01))
DOWN, UP = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"

ODD_ENTRY = json.dumps({"layers": [{"name": DOWN, "plain": "little", "salience": {"channels": 3}}]}).encode()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A module of 3 bits in groups of 32 and one of 8 bits a row, an embedding and a norm; errors of one are known."""
    report = {"layers": [asdict(LayerLoss(DOWN, "mean^0.5", plain=0.25, chosen=0.125, salience=SALIENCE))]}
    with CheckpointWriter(tmp_path / "out", expected_bytes=0, output_format=OutputFormat.COMPRESSED_TENSORS) as writer:
        writer.add_packed(DOWN, random_weight(32, 64, 32, bits=3))
        writer.add_packed(UP, random_weight(64, 32, 32, bits=8))
        writer.add_tensor("model.embed_tokens.weight", torch.zeros(10, 32).half())
        writer.add_tensor("model.norm.weight", torch.zeros(32).half())
        config = {"model_type": "llama", "quantization_config": writer.quantization_config(())}
        writer.commit(config, {"report.json": json.dumps(report).encode()})
    return tmp_path / "out"


def test_every_module_is_described_by_its_own_tensors(checkpoint: Path) -> None:
    inspection = inspect_checkpoint(checkpoint)

    # codes, scales, zero points (32 outputs of 3 bits are 3 words, of 8 bits 8), and 16 bytes that say the shape
    down_bytes = 32 * 64 * 3 // 8 + 32 * 2 * 2 + 2 * 3 * 4 + 16
    up_bytes = 64 * 32 + 64 * 2 + 2 * 8 * 4 + 16
    assert inspection.format == "compressed-tensors pack-quantized"
    assert inspection.quantized == (
        QuantizedModule(DOWN, (32, 64), 3, 32, down_bytes, plain_error=0.25, error=0.125, salience=SALIENCE),
        QuantizedModule(UP, (64, 32), 8, 32, up_bytes, plain_error=None, error=None, salience=None),
    )
    assert inspection.unquantized == (PlainTensor("model.embed_tokens.weight", (10, 32), "float16", 640),)
    assert inspection.num_parameters == 2 * 2048 + 320 + 32
    assert inspection.num_bytes == down_bytes + up_bytes + 640 + 64
    assert inspection.bits_per_weight == pytest.approx(8 * (down_bytes + up_bytes) / 4096)
    assert inspection.bits_per_parameter == pytest.approx(8 * inspection.num_bytes / inspection.num_parameters)


def test_an_unquantized_model_has_no_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")

    inspection = inspect_checkpoint(tmp_path)

    assert inspection.format is None
    assert inspection.bits_per_weight is None
    assert inspection.bits_per_parameter == 32
    assert inspection.unquantized == (PlainTensor("a.weight", (2, 3), "float32", 24),)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"layers": 3}', b'{"layers": [4, {"name": 5}]}', ODD_ENTRY])
def test_a_report_of_another_kind_says_nothing_about_errors(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "report.json").write_bytes(content)

    assert [module.error for module in inspect_checkpoint(checkpoint).quantized] == [None, None]


def test_a_damaged_checkpoint_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect_checkpoint(checkpoint)


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", *arguments])


def test_the_command_prints_tables_for_people(checkpoint: Path) -> None:
    result = invoke(str(checkpoint))

    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("│")}
    assert [cell.strip() for cell in rows[DOWN].split("│")[2:-1]] == ["32 x 64", "3", "32", "0.9", "0.12500", "0.25000"]
    assert [cell.strip() for cell in rows[UP].split("│")[2:-1]] == ["64 x 32", "8", "row", "2.3", "", ""]
    assert "10 x 32" in rows["model.embed_tokens.weight"]
    assert "compressed-tensors pack-quantized" in result.stdout
    assert "folded scales" not in result.stdout


def test_the_linears_that_have_scales_folded_in_are_counted(checkpoint: Path) -> None:
    scales = {DOWN: ModuleScales(torch.ones(64) / 2), UP: ModuleScales(None, torch.ones(64) / 2)}
    (checkpoint / FOLDED_SCALES_FILE).write_bytes(encode_folded_scales(scales))

    assert inspect_checkpoint(checkpoint).num_scaled == 2
    assert "of 2 linears, in folded_scales.awq" in invoke(str(checkpoint)).stdout


def test_the_salient_channels_are_shown_with_their_part_of_the_error_and_the_mean_of_the_modules(
    checkpoint: Path,
) -> None:
    # given a report that knows the other module too: half of its error lies in one channel, and none is removed
    other = Salience((7,), ChannelErrors(0.3, 0.3), ChannelErrors(0.06, 0.06))
    layers = [LayerLoss(DOWN, "x", 0.25, 0.125, SALIENCE), LayerLoss(UP, "x", 0.25, 0.25, other)]
    (checkpoint / "report.json").write_text(json.dumps({"layers": [asdict(layer) for layer in layers]}))

    result = invoke(str(checkpoint), "--salience")

    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows == [
        [DOWN, "5, 40, 1, 2 and 2 more", "50.0 %", "12.5 %", "x 0.25", "2.0 %", "1.0 %"],
        [UP, "7", "30.0 %", "30.0 %", "x 1.00", "6.0 %", "6.0 %"],
        # the mean of the shares
        ["mean", "", "40.0 %", "21.2 %", "x 0.53", "4.0 %", "3.5 %"],
    ]


def test_a_checkpoint_whose_report_names_no_salient_channels_says_what_to_do(checkpoint: Path) -> None:
    (checkpoint / "report.json").unlink()

    result = invoke(str(checkpoint), "--salience")

    assert result.exit_code == 2
    assert "has no report.json that says which channels are salient: quantize the model with this program" in (
        result.stderr
    )


def test_the_command_prints_one_json_object_for_programs(checkpoint: Path) -> None:
    result = invoke(str(checkpoint), "--json")

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(json.dumps(inspect_checkpoint(checkpoint).to_json()))


def test_a_place_that_is_no_checkpoint_ends_with_code_2(tmp_path: Path) -> None:
    result = invoke(str(tmp_path / "nothing"))

    assert result.exit_code == 2
    assert "nothing" in result.stderr
