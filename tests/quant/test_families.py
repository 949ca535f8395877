"""Every family from a source directory to a checkpoint and back: names, what is quantized, how near the result is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from quant.checkpoint.reader import CheckpointReader
from quant.dense_checkpoint import load_dense
from quant.errors import CheckpointError, SourceError
from quant.evaluate import EvalOptions, TextWindows, evaluate_checkpoint
from quant.inspect_checkpoint import inspect_checkpoint
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from tests.quant.tiny_families import EXPERTS, TOKENS, VARIANTS, Variant
from tests.tiny_models import save_tiny_model

AWQ = Recipe(num_samples=16, sample_tokens=32, num_windows=0)
RTN = Recipe(method=Method.RTN, num_windows=0)
BY_NAME = {variant.name: variant for variant in VARIANTS}
PACKED = ("qweight", "qzeros", "scales")
ROUTERS = (".mlp.gate", ".block_sparse_moe.gate", ".mlp.shared_expert_gate")
# in turn: partly rotated heads; states in a tuple; experts; routers with saved buffers; fused queries and one key head
WITHOUT_A_ROW = {
    "stablelm": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "olmoe": EXPERTS,
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 512},
}


def stored_names(directory: Path) -> set[str]:
    """The names of a checkpoint's tensors, a packed weight under the name that it had when it was dense."""
    names = CheckpointReader.open(directory).tensor_names
    return {f"{name.rpartition('.')[0]}.weight" if name.endswith(PACKED) else name for name in names}


def kept_modules(directory: Path) -> list[str]:
    config = json.loads((directory / "config.json").read_text())
    return config["quantization_config"]["modules_to_not_convert"]


def divergence(model: PreTrainedModel, original: PreTrainedModel) -> float:
    with torch.no_grad():
        log_p, log_q = (candidate(TOKENS).logits.log_softmax(dim=-1) for candidate in (original, model))
    return float(torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / TOKENS.numel())


def open_dense(variant: Variant, directory: Path, seed: int = 0) -> PreTrainedModel:
    saved = save_tiny_model(variant.model_type, directory, config_overrides=variant.fields, seed=seed)
    return AutoModelForCausalLM.from_pretrained(saved).eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_checkpoint_has_its_sources_names_and_is_near_it(variant: Variant, tmp_path: Path) -> None:
    original = open_dense(variant, tmp_path / "model")
    stranger = open_dense(variant, tmp_path / "stranger", seed=1)

    report = quantize(AWQ, tmp_path / "model", tmp_path / "awq")

    assert stored_names(tmp_path / "awq") == stored_names(tmp_path / "model")
    assert report.notes == ()
    assert 5 * divergence(load_dense(tmp_path / "awq"), original) < divergence(stranger, original)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_name_of_what_is_kept_is_part_of_a_quantized_one(variant: Variant, tmp_path: Path) -> None:
    """Servers match the list of kept modules as parts of names."""
    save_tiny_model(variant.model_type, tmp_path / "model", config_overrides=variant.fields)
    quantize(RTN, tmp_path / "model", tmp_path / "rtn")
    quantized = CheckpointReader.open(tmp_path / "rtn").quantized_module_names
    assert not [(kept, name) for kept in kept_modules(tmp_path / "rtn") for name in quantized if kept in name]


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_experts_are_quantized_one_by_one_and_routers_are_not(name: str, tmp_path: Path) -> None:
    variant = BY_NAME[name]
    open_dense(variant, tmp_path / "model")

    quantize(RTN, tmp_path / "model", tmp_path / "rtn")

    reader = CheckpointReader.open(tmp_path / "rtn")
    routers = {name for name in stored_names(tmp_path / "model") if name.removesuffix(".weight").endswith(ROUTERS)}
    kept = set(kept_modules(tmp_path / "rtn"))
    assert routers <= set(reader.tensor_names)
    assert {name.removesuffix(".weight") for name in routers} <= kept
    # the names of the hub's own checkpoints, which other servers read
    expert = "block_sparse_moe.experts.3.w1" if name == "mixtral" else "mlp.experts.3.gate_proj"
    assert f"model.layers.1.{expert}.qweight" in reader.tensor_names
    shared = 3 if name == "qwen2-moe" else 0
    assert len(reader.quantized_module_names) == 2 * (4 + 3 * 4 + shared)


@pytest.mark.parametrize("name", ["mixtral", "gemma3-with-vision"])
def test_the_errors_in_the_report_are_found_under_the_names_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    # given a family whose checkpoints call linears otherwise than the model does
    open_dense(BY_NAME[name], tmp_path / "model")

    report = quantize(replace(AWQ, lm_head=4), tmp_path / "model", tmp_path / "awq")

    modules = inspect_checkpoint(tmp_path / "awq").quantized
    assert {layer.name for layer in report.layers} == {module.name for module in modules}
    assert all(module.error is not None and module.plain_error is not None for module in modules)
    assert all(module.salience is not None for module in modules if not module.name.endswith("lm_head"))


def test_the_checkpoint_of_a_mixture_of_experts_is_evaluated_beside_its_plain_rounding(tmp_path: Path) -> None:
    open_dense(BY_NAME["mixtral"], tmp_path / "model")
    quantize(RTN, tmp_path / "model", tmp_path / "rtn")

    table = evaluate_checkpoint(EvalOptions(tmp_path / "rtn", windows=TextWindows(num_windows=1, window_tokens=64)))

    original, plain, checkpoint = table.rows
    assert checkpoint.perplexity == pytest.approx(plain.perplexity, rel=1e-3)
    assert original.perplexity != pytest.approx(plain.perplexity, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w1"),
        ("qwen3-moe", "model.layers.1.mlp.experts.3.down_proj"),
        ("opt", "model.decoder.layers.1.fc2"),
    ],
)
def test_a_checkpoint_that_lacks_a_layer_is_refused(name: str, dropped: str, tmp_path: Path) -> None:
    open_dense(BY_NAME[name], tmp_path / "model")
    quantize(RTN, tmp_path / "model", tmp_path / "rtn")
    file = tmp_path / "rtn" / "model.safetensors"
    kept = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(dropped)}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not hold the tensors of its model"):
        load_dense(tmp_path / "rtn")


@pytest.mark.parametrize("model_type", WITHOUT_A_ROW)
def test_an_architecture_without_a_row_is_quantized_and_says_so(model_type: str, tmp_path: Path) -> None:
    variant = Variant(model_type, model_type, WITHOUT_A_ROW[model_type])
    original = open_dense(variant, tmp_path / "model")
    stranger = open_dense(variant, tmp_path / "stranger", seed=1)

    report = quantize(AWQ, tmp_path / "model", tmp_path / "awq")

    assert len(report.notes) == 1
    assert report.notes[0].startswith(f"{model_type} has no row in the table of architectures")
    assert {layer.formula for layer in report.layers} == {"identity"}
    routers = [name for name in stored_names(tmp_path / "awq") if name.endswith(".mlp.gate.weight")]
    assert {name.removesuffix(".weight") for name in routers} <= set(kept_modules(tmp_path / "awq"))
    assert stored_names(tmp_path / "awq") == stored_names(tmp_path / "model")
    assert 5 * divergence(load_dense(tmp_path / "awq"), original) < divergence(stranger, original)


def test_experts_of_an_architecture_without_a_row_stay_as_they_are_and_a_sentence_says_how_much_that_is(
    tmp_path: Path,
) -> None:
    original = open_dense(Variant("gpt-oss", "gpt_oss", {"num_local_experts": 4}), tmp_path / "model")

    report = quantize(AWQ, tmp_path / "model", tmp_path / "awq")

    assert stored_names(tmp_path / "awq") == stored_names(tmp_path / "model")
    assert "of the blocks' weights are not in linear layers, and stay in 16 bits" in report.notes[1]
    dense = load_dense(tmp_path / "awq").get_parameter("model.layers.0.mlp.experts.down_proj")
    assert torch.equal(dense, original.get_parameter("model.layers.0.mlp.experts.down_proj").half().float())


def test_blocks_without_a_linear_layer_are_refused(tmp_path: Path) -> None:
    fields = WITHOUT_A_ROW["gpt_bigcode"]
    save_tiny_model("gpt2", tmp_path / "model", config_overrides=fields)
    with pytest.raises(SourceError, match="'gpt2' has no linear layer in its blocks"):
        quantize(RTN, tmp_path / "model", tmp_path / "rtn")
