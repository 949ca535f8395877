"""Mixtures of experts in every format: what the quantizer writes is served, and what does not fit is named."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu_experts import CpuExperts
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from quant.method import Method
from quant.pipeline import quantize
from quant.recipe import Recipe
from server.model.decoder import Mlp
from server.model.moe import Moe
from server.model.native_loader import find_native_obstacle
from tests.server.model.quantized_models import quantize_in_place
from tests.server.model.test_checkpoint_formats import assert_computes_the_dequantized_model, load
from tests.server.model.test_loader import rewrite
from tests.tiny_models import TINY_MOE_TYPES, save_tiny_model

# rounding must not turn a choice where numbers are compared
EVERY_EXPERT = {"num_experts_per_tok": 4, "num_experts": 4, "num_local_experts": 4}


def moe_of(directory: Path, layer: int = 0) -> Moe:
    moe = load(directory).decoder.layers[layer].mlp
    assert isinstance(moe, Moe)
    return moe


def save_moe(model_type: str, directory: Path, **overrides: object) -> Path:
    return save_tiny_model(model_type, directory, config_overrides={**EVERY_EXPERT, **overrides})


@pytest.mark.parametrize("model_type", TINY_MOE_TYPES)
def test_what_the_quantizer_makes_of_experts_is_served(model_type: str, tmp_path: Path) -> None:
    original = save_moe(model_type, tmp_path / "model")
    quantize(Recipe(num_samples=4, sample_tokens=32, num_windows=0, group_size=32), original, tmp_path / "out")

    assert_computes_the_dequantized_model(tmp_path / "out")

    moe = moe_of(tmp_path / "out")
    assert isinstance(moe.gate_up, CpuExperts)
    assert isinstance(moe.down, CpuExperts)


@pytest.mark.parametrize(
    ("bits", "output_format", "kind"),
    [(3, None, CpuExperts), (4, OutputFormat.COMPRESSED_TENSORS, CpuExperts), (8, None, Tensor)],
)
def test_experts_of_other_formats_and_bits_are_served(
    bits: int, output_format: OutputFormat | None, kind: type, tmp_path: Path
) -> None:
    original = save_moe("qwen2_moe", tmp_path / "model", mlp_only_layers=[0])
    recipe = Recipe(method=Method.RTN, num_windows=0, bits=bits, group_size=32, format=output_format)
    quantize(recipe, original, tmp_path / "out")

    model = assert_computes_the_dequantized_model(tmp_path / "out")

    assert isinstance(model.decoder.layers[0].mlp, Mlp)
    assert isinstance(moe_of(tmp_path / "out", layer=1).gate_up, kind)


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        (lambda name: "attn" in name, (Tensor, Tensor)),
        (lambda name: "down_proj" in name, (Tensor, CpuExperts)),
        (lambda name: "experts.2" in name, (Tensor, Tensor)),
    ],
    ids=["none", "one product of all", "one of all experts"],
)
def test_a_checkpoint_may_quantize_some_experts_only(
    wanted: Callable[[str], bool], kinds: tuple[type, type], tmp_path: Path
) -> None:
    directory = save_moe("qwen3_moe", tmp_path)
    quantize_in_place(directory, wanted)

    assert_computes_the_dequantized_model(directory)

    moe = moe_of(directory)
    assert (type(moe.gate_up), type(moe.down)) == kinds


def test_a_token_is_given_the_same_bits_whatever_is_routed_beside_it(tmp_path: Path) -> None:
    directory = save_tiny_model("qwen2_moe", tmp_path)
    quantize_in_place(directory, lambda name: True)
    moe = moe_of(directory)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        together = moe(x)
        alone = torch.cat([moe(row[None]) for row in x])

    assert torch.equal(together, alone)


def drop_an_expert(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def drop_the_router(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.gate.weight"]


def drop_the_shared_gate(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.shared_expert_gate.weight"]


def add_an_expert(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.experts.6.up_proj.weight"] = torch.zeros(64, 64)


def widen_the_router(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_an_expert, r"lacks model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"),
        (drop_the_router, r"lacks model\.layers\.0\.mlp\.gate\.weight"),
        (drop_the_shared_gate, r"lacks model\.layers\.0\.mlp\.shared_expert_gate\.weight"),
        (add_an_expert, r"has model\.layers\.0\.mlp\.experts\.6\.up_proj\.weight, which a model of its config has no"),
        (widen_the_router, r"mlp\.gate\.weight has the shape \[8, 64\]; the config asks for \[6, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    directory = save_tiny_model("qwen2_moe", tmp_path)
    rewrite(directory, change)

    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_an_expert_that_is_missing_among_packed_ones_is_named(tmp_path: Path) -> None:
    directory = save_tiny_model("mixtral", tmp_path)
    quantize_in_place(directory, lambda name: True)

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in CheckpointReader.open(directory).packed_tensor_names(
            "model.layers.0.block_sparse_moe.experts.3.w2"
        ):
            del tensors[name]

    rewrite(directory, drop)

    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.block_sparse_moe\.experts\.3\.w2\.weight"):
        load(directory)


@pytest.mark.parametrize("model_type", TINY_MOE_TYPES)
def test_the_native_kernels_have_none_for_experts(model_type: str, tmp_path: Path) -> None:
    assert find_native_obstacle(save_tiny_model(model_type, tmp_path)) == "its layers are mixtures of experts"
