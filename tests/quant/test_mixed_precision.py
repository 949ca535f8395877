"""A target of bits per weight: kept, spent where it helps, written so that every reader finds each module's scheme."""

import json
from pathlib import Path

import pytest
import torch

from kernels.weight_kinds import WHOLE_ROW
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.reader import CheckpointReader
from quant.checkpoint.stored_module import bits_per_weight
from quant.dense_checkpoint import load_dense
from quant.errors import RecipeError
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.report import Report
from tests.tiny_models import save_tiny_model

TARGET = 5.0
INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def mixed(target: float, bits: int = 4, group_size: int | None = None) -> Recipe:
    return Recipe(num_samples=6, sample_tokens=48, num_windows=0, bits=bits, group_size=group_size, target_bpw=target)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def made(model: Path) -> tuple[Report, CheckpointReader]:
    report = quantize(mixed(TARGET), model, model.parent / "mixed")
    return report, CheckpointReader.open(model.parent / "mixed")


def test_the_average_is_at_most_the_target_and_close_to_it(made: tuple[Report, CheckpointReader]) -> None:
    report, reader = made
    written = bits_per_weight(reader.packed_spec(name) for name in reader.quantized_module_names)
    assert written == report.bits_per_weight
    # eight bits instead of four for queries, keys and values of a block, a ninth of all weights, would be too much
    assert TARGET - 4.5 / 9 < written <= TARGET


def test_linears_of_one_input_have_the_same_bits_and_groups(made: tuple[Report, CheckpointReader]) -> None:
    _, reader = made
    kinds = {
        name: (reader.packed_spec(name).bits, reader.packed_spec(name).group_size)
        for name in reader.quantized_module_names
    }
    assert len(set(kinds.values())) > 1
    for index in range(2):
        for together in INPUTS:
            own = [kinds[name] for name in kinds if f".{index}." in name and name.endswith(together)]
            assert len(own) == len(together)
            assert len(set(own)) == 1


def test_the_config_names_the_scheme_of_every_module(made: tuple[Report, CheckpointReader]) -> None:
    _, reader = made
    config = reader.config["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    named = {
        name: (group["weights"]["num_bits"], group["weights"]["group_size"])
        for group in config["config_groups"].values()
        for name in group["targets"]
    }
    assert named.keys() == set(reader.quantized_module_names)
    for name, (bits, group_size) in named.items():
        spec = reader.packed_spec(name)
        assert (bits, group_size or spec.num_inputs) == (spec.bits, spec.group_size)


def test_the_report_says_what_share_has_what(made: tuple[Report, CheckpointReader]) -> None:
    report, reader = made
    assert sum(share.num_linears for share in report.mixture) == len(reader.quantized_module_names) == 14
    stored = json.loads((reader.directory / "report.json").read_text())
    assert [share["bits"] for share in stored["mixture"]] == [share.bits for share in report.mixture]
    assert {(share.bits, share.group_size) for share in report.mixture} == {
        (spec.bits, WHOLE_ROW if spec.is_whole_row else spec.group_size)
        for spec in map(reader.packed_spec, reader.quantized_module_names)
    }


def distance(model: Path, checkpoint: Path) -> float:
    tokens = torch.arange(3 * 40).view(3, 40) * 11 % 256
    with torch.no_grad():
        before, after = (load_dense(path)(tokens).logits.log_softmax(dim=-1) for path in (model, checkpoint))
    return float(torch.nn.functional.kl_div(after, before, log_target=True, reduction="batchmean"))


def test_more_bits_are_closer_to_the_original(
    model: Path, made: tuple[Report, CheckpointReader], tmp_path: Path
) -> None:
    quantize(mixed(4.4), model, tmp_path / "fewer")
    quantize(mixed(7.0), model, tmp_path / "more")
    near, middle, far = (distance(model, path) for path in (tmp_path / "more", made[1].directory, tmp_path / "fewer"))
    assert near < middle < far


def test_the_same_recipe_gives_the_same_bytes(
    made: tuple[Report, CheckpointReader], model: Path, tmp_path: Path
) -> None:
    quantize(mixed(TARGET), model, tmp_path / "again")
    file = "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (made[1].directory / file).read_bytes()


def test_three_bits_are_the_least_where_they_are_asked_for(model: Path, tmp_path: Path) -> None:
    quantize(mixed(3.7, bits=3), model, tmp_path / "out")
    reader = CheckpointReader.open(tmp_path / "out")
    bits = {reader.packed_spec(name).bits for name in reader.quantized_module_names}
    assert 3 in bits
    assert bits_per_weight(reader.packed_spec(name) for name in reader.quantized_module_names) <= 3.7


def test_a_group_size_that_is_asked_for_is_the_largest(model: Path, tmp_path: Path) -> None:
    quantize(mixed(5.5, group_size=32), model, tmp_path / "out")
    reader = CheckpointReader.open(tmp_path / "out")
    assert {reader.packed_spec(name).group_size for name in reader.quantized_module_names} == {32}


# 4 bits a code and 20 a row: of 128 for the down projections, 2 / 9 of the weights, and of 64 for all others
@pytest.mark.parametrize(
    ("target", "possible"), [(4.0, r"4\.278 to 8\.75; --bits 3 allows less"), (12, r"4\.278 to 8\.75$")]
)
def test_a_target_that_cannot_be_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, target: float, possible: str
) -> None:
    with pytest.raises(RecipeError, match=possible):
        quantize(mixed(target), model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"target_bpw": 0.0}, "the target is 0.0 bits per weight; it must be a number like 4.25"),
        ({"target_bpw": float("nan")}, "the target is nan bits per weight"),
        ({"target_bpw": 5.0, "method": Method.RTN}, "the method rtn reads none; use --method awq.gptq"),
        (
            {"target_bpw": 5.0, "format": OutputFormat.AWQ},
            "gives linears different bits and groups, and the AWQ gemm format holds 4 bits only; use --format compress",
        ),
        ({"lm_head": 8, "format": OutputFormat.AWQ}, "lm head is 8, and the AWQ gemm format holds 4 bits only"),
        ({"lm_head": 3}, "lm head is 3; supported: 8, 4, or left alone"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Recipe(**fields)
