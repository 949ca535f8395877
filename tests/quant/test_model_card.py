"""The card of a checkpoint: what the hub reads of it, how to make it again, and nothing of the machine it is from."""

import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from quant.checkpoint.format_name import OutputFormat
from quant.cli import app
from quant.device_name import DeviceName
from quant.method import Method
from quant.model_card import SERVED_TYPES, model_card, read_licence, recipe_options
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.report import CalibrationOrigin, CalibrationSummary, GroupingShare, HeldOutQuality, Report
from quant.scale_groups import FAMILIES
from server.model.architectures import ARCHITECTURE_OF_TYPE
from tests.tiny_models import save_tiny_model

REPORT = Report(
    source="/home/somebody/models/Tiny-1B",
    recipe=Recipe(calibration="/home/somebody/text.txt:0.5,self:0.5", num_samples=8, sample_tokens=64, seed=3),
    group_size=64,
    mixture=(),
    calibration=CalibrationSummary(
        (CalibrationOrigin("text.txt", 0.5, 4), CalibrationOrigin("text by the model itself", 0.5, 4)), "ab" * 32, 512
    ),
    layers=(),
    blocks=(),
    held_out=HeldOutQuality(10.0, 11.0, 0.0625, 0.75, 2, 512),
    bits_per_weight=4.3125,
    notes=(),
    seconds=1.0,
    peak_memory_bytes=1,
    device="cpu",
    peak_device_bytes=None,
)


def front_matter(card: bytes) -> Mapping[str, object]:
    return ModelCard(card.decode()).data.to_dict()


def command_of(card: bytes) -> list[str]:
    (line,) = (line for line in card.decode().splitlines() if line.startswith("    awq-serve quantize "))
    return shlex.split(line)


def test_the_hub_reads_where_a_model_of_the_hub_comes_from() -> None:
    card = front_matter(model_card(replace(REPORT, source="owner/Tiny-1B"), "Tiny-1B-awq", {"license": "mit"}, "llama"))

    assert card["base_model"] == "owner/Tiny-1B"
    assert card["base_model_relation"] == "quantized"
    assert card["license"] == "mit"
    assert {"awq", "4-bit"} <= set(card["tags"])


def test_a_local_model_has_no_base_model_and_no_licence_that_was_not_stated() -> None:
    card = front_matter(model_card(REPORT, "Tiny-1B-awq", {}, "llama"))
    assert not {"base_model", "license"} & set(card)


def test_no_place_on_the_machine_is_named() -> None:
    card = model_card(REPORT, "Tiny-1B-awq", {}, "llama").decode()
    assert "somebody" not in card
    assert command_of(card.encode())[2:4] == ["Tiny-1B", "Tiny-1B-awq"]
    assert "50 % text.txt, 50 % text by the model itself" in card


def test_the_measured_quality_is_a_table() -> None:
    card = model_card(REPORT, "Tiny-1B-awq", {}, "llama").decode()
    assert "| original | 10.000 | | |" in card
    assert "| this one | 11.000 | 0.06250 | 75.00 % |" in card
    assert "2 windows of 512 tokens" in card
    assert "Not measured" in model_card(replace(REPORT, held_out=None), "Tiny-1B-awq", {}, "llama").decode()


def test_the_card_says_how_to_load_it() -> None:
    card = model_card(REPORT, "my model", {}, "llama").decode()
    assert "    awq-serve serve 'my model'" in card
    assert "    vllm serve 'my model'" in card


def test_a_family_that_the_server_does_not_serve_is_sent_elsewhere() -> None:
    card = model_card(REPORT, "opt-awq", {}, "opt").decode()
    assert "    awq-serve serve" not in card
    assert "`awq-serve serve` does not serve this family" in card
    assert "    vllm serve opt-awq" in card


def test_the_families_that_the_card_takes_for_served_are_those_of_the_server() -> None:
    assert set(SERVED_TYPES) == set(ARCHITECTURE_OF_TYPE)


def test_every_family_that_is_served_is_quantized_with_scales() -> None:
    assert set(SERVED_TYPES) <= set(FAMILIES)


def test_the_card_says_how_the_weights_are_stored() -> None:
    assert (
        "in 4 bits, groups of 64: AWQ `gemm` format, 4.31 bits a weight"
        in model_card(REPORT, "x", {}, "llama").decode()
    )
    row = replace(REPORT, recipe=replace(REPORT.recipe, bits=8), group_size=-1, bits_per_weight=8.04)
    card = model_card(row, "x", {}, "llama")
    assert "in 8 bits, one scale a row: compressed-tensors `pack-quantized` format, 8.04 bits" in card.decode()
    assert "--group-size row" in card.decode()


def test_the_card_of_a_mixture_says_what_share_of_the_weights_has_how_many_bits() -> None:
    mixture = (GroupingShare(4, -1, 3, 600), GroupingShare(4, 64, 2, 300), GroupingShare(8, 32, 1, 100))
    recipe = replace(REPORT.recipe, target_bpw=4.5, lm_head=8)

    card = model_card(replace(REPORT, recipe=recipe, mixture=mixture, bits_per_weight=4.49), "x", {}, "llama").decode()

    shares = "4 bits, one scale a row (60 %); 4 bits, groups of 64 (30 %); 8 bits, groups of 32 (10 %)"
    assert f"in {shares}: compressed-tensors `pack-quantized` format, 4.49 bits a weight" in card
    assert "The output head is in 8 bits." in card
    # the sizes to choose from are those that auto allows, not only the one that all could have
    assert "--group-size auto" in card


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# Model", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit]\n---\n", {}),
        ("---\nlanguage: en\n---\nlicense: mit", {}),
        ("# Model\n\nlicense: mit", {}),
        ("---\n: [\n---\n", {}),
        ("---\njust words\n---\n", {}),
    ],
)
def test_a_licence_is_carried_over_where_the_originals_card_states_it(
    tmp_path: Path, card: str, licence: dict[str, str]
) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_licence(tmp_path) == licence


def test_a_model_without_a_card_states_no_licence(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    assert read_licence(tmp_path) == read_licence(tmp_path / "model.gguf") == {}


def test_strange_names_stay_what_they_are_in_the_front_matter() -> None:
    card = model_card(replace(REPORT, source="owner/yes"), "x", {"license": 'a: "b"\n---'}, "llama")
    assert yaml.safe_load(card.decode().split("\n---\n")[0])["license"] == 'a: "b"\n---'


def test_the_command_of_the_card_makes_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a checkpoint of a recipe without a default in it, and its directory as the working one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The river rises in the hills. " * 40)
    calibration = f"{tmp_path / 'text.txt'}:0.5,self:0.5"
    recipe = Recipe(calibration=calibration, group_size=32, num_samples=4, sample_tokens=40, num_windows=0, seed=7)
    quantize(recipe, save_tiny_model("llama", tmp_path / "tiny"), tmp_path / "tiny-awq")
    made = load_file(tmp_path / "tiny-awq" / "model.safetensors")
    card = (tmp_path / "tiny-awq" / "README.md").read_bytes()
    (tmp_path / "tiny-awq").rename(tmp_path / "first")

    result = CliRunner().invoke(app, command_of(card)[1:])

    assert result.exit_code == 0, result.output
    again = load_file(tmp_path / "tiny-awq" / "model.safetensors")
    assert again.keys() == made.keys()
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_every_choice_of_a_recipe_is_in_the_command() -> None:
    # given recipes that differ in one field each
    changed = {
        "method": Method.BEST,
        "bits": 8,
        "format": OutputFormat.COMPRESSED_TENSORS,
        "group_size": None,  # the report says what it came to
        "calibration": "wikitext",
        "num_samples": 9,
        "sample_tokens": 65,
        "num_windows": 0,
        "seed": 4,
        "max_kl": 0.5,
        "target_bpw": 4.5,
        "lm_head": 8,
        "device": DeviceName.CPU,
    }
    assert {field.name for field in fields(Recipe)} == set(changed)
    for name, value in changed.items():
        if value is not None:
            other = replace(REPORT, recipe=replace(REPORT.recipe, **{name: value}))
            assert recipe_options(other) != recipe_options(REPORT), name
    assert recipe_options(replace(REPORT, group_size=32)) != recipe_options(REPORT)
