"""What is said to be folded into linears is what was: with it an adapter of the original adds what it learned."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.block import fold_scales, folded_scales
from quant.block_groups import groups_of
from quant.checkpoint.folded_scales import ModuleScales, read_folded_scales
from quant.method import Method
from quant.model_structure import find_blocks
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.scale_groups import linear_of, rows_of
from quant.scale_search import ScaleCandidate, ScaleChoice
from tests.quant.tiny_families import TOKENS, VARIANTS, Variant, open_tiny
from tests.tiny_models import save_tiny_model

RECIPE = Recipe(num_samples=4, sample_tokens=32, num_windows=0)


def fold_randomly(model: PreTrainedModel, model_type: str) -> dict[str, ModuleScales]:
    """Fold a random scale into every group of every block, in place; returns what is said of it, by linear."""
    generator = torch.Generator().manual_seed(7)
    said = {}
    for block_name, block in find_blocks(model).blocks.items():
        groups = groups_of(block, rows_of(model_type), model.config)
        choices = {}
        for group in groups:
            num_channels = linear_of(block, group.linears[0]).in_features // group.spread.repeats
            scale = torch.empty(num_channels).uniform_(0.2, 5, generator=generator)
            choices[group.observed] = ScaleChoice(ScaleCandidate("random", scale), (), (), ())
        scales = folded_scales(groups, fold_scales(block, groups, choices))
        said |= {f"{block_name}.{name}": own for name, own in scales.items()}
    return said


def adapt(model: PreTrainedModel, updates: Mapping[str, Tensor]) -> Tensor:
    """The logits with updates [N, K] of the linears of these names added to their weights."""
    for name, update in updates.items():
        linear_of(model, name).weight += update
    logits: Tensor = model(TOKENS).logits
    return logits


def random_updates(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of rank 2, of every linear of the blocks that is no router."""
    generator = torch.Generator().manual_seed(1)
    blocks = f"{find_blocks(model).name}."
    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(blocks) and not name.endswith("gate"):
            down = torch.randn(2, module.in_features, generator=generator) * module.in_features**-0.5
            updates[name] = 0.2 * torch.randn(module.out_features, 2, generator=generator) @ down
    return updates


def rescaled(update: Tensor, scales: ModuleScales) -> Tensor:
    """diag(1 / divisor) U diag(scale): what `B A` becomes where A is multiplied by the scale and B divided."""
    scaled = update if scales.input_scale is None else update * scales.input_scale
    return scaled if scales.output_divisor is None else scaled / scales.output_divisor[:, None]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_over_folded_weights_a_rescaled_adapter_gives_what_it_gives_over_the_original(
    variant: Variant, tmp_path: Path
) -> None:
    original = open_tiny(variant, tmp_path / "model")
    folded, unscaled = copy.deepcopy(original), copy.deepcopy(original)
    updates = random_updates(original)
    expected = adapt(original, updates)

    scales = fold_randomly(folded, variant.model_type)
    fold_randomly(unscaled, variant.model_type)
    fitted = {name: rescaled(update, scales.get(name, ModuleScales())) for name, update in updates.items()}

    torch.testing.assert_close(adapt(folded, fitted), expected, rtol=0, atol=1e-4)
    # and as it is it would give something else
    assert float((adapt(unscaled, updates) - expected).abs().max()) > 0.05


@pytest.mark.parametrize("method", [Method.RTN, Method.GPTQ])
def test_a_checkpoint_without_scales_says_that_it_has_none(method: Method, tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "model")

    quantize(RECIPE.with_method(method), model, tmp_path / "out")

    assert read_folded_scales(tmp_path / "out") == {}


def test_a_block_that_was_rounded_as_it_was_has_no_scales(tmp_path: Path) -> None:
    # given a model where 8 bits leave little to search: AWQ alone keeps the first block plain, and scales the second
    model = save_tiny_model("llama", tmp_path / "model")
    recipe = replace(RECIPE.with_method(Method.AWQ), bits=8, group_size=32)

    report = quantize(recipe, model, tmp_path / "out")

    kept = {block.name: block.kept for block in report.blocks}
    scales = read_folded_scales(tmp_path / "out")
    assert set(kept.values()) == {"plain", "searched"}
    assert scales is not None
    assert {name[: len("model.layers.0")] for name in scales} == {
        name for name, how in kept.items() if how == "searched"
    }


def test_experts_take_no_adapter_and_have_no_scales_in_the_file(tmp_path: Path) -> None:
    variant = next(variant for variant in VARIANTS if variant.name == "qwen2-moe")
    model = save_tiny_model(variant.model_type, tmp_path / "model", config_overrides=variant.fields)

    quantize(RECIPE, model, tmp_path / "out")

    names = {name.removeprefix("model.layers.") for name in read_folded_scales(tmp_path / "out") or ()}
    assert {"0.mlp.shared_expert.up_proj", "1.self_attn.o_proj"} <= names
    assert not [name for name in names if ".experts." in name]
