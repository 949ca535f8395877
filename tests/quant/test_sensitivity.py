"""What a unit loses is measured on what its block gives, in units that may share a grouping, and leaves no trace."""

from pathlib import Path

import pytest
import torch

from kernels.weight_kinds import WHOLE_ROW
from quant.bit_allocation import OptionRange
from quant.blockwise_model import BlockwiseModel
from quant.capture import run_block
from quant.model_plan import ModelPlan, plan_model
from quant.recipe import Recipe
from quant.rounding import round_plainly
from quant.scale_groups import linear_of
from quant.scale_search import Grouping
from quant.sensitivity import Unit, measure_sensitivity, mixture_of, sample_of
from tests.quant.blockwise_models import to_blockwise
from tests.quant.tiny_families import VARIANTS, open_tiny

TOKENS = torch.arange(4 * 40).view(4, 40) * 7 % 256
ALLOWED = OptionRange(4, None)
BLOCK = "model.layers.0"


def opened(name: str, directory: Path) -> tuple[BlockwiseModel, ModelPlan]:
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == name), directory)
    return to_blockwise(model), plan_model(Recipe(), model)


def measured(model: BlockwiseModel, plan: ModelPlan) -> tuple[Unit, ...]:
    with torch.no_grad():
        return measure_sensitivity(model, plan, ALLOWED, TOKENS, lambda done, total: None)


def short_names(units: tuple[Unit, ...], block: str = BLOCK) -> list[tuple[str, ...]]:
    prefix = f"{block}."
    own = [unit for unit in units if unit.linears[0].startswith(prefix)]
    return [tuple(name.removeprefix(prefix) for name in unit.linears) for unit in own]


def test_linears_that_read_one_input_are_a_unit(tmp_path: Path) -> None:
    model, plan = opened("llama", tmp_path)
    assert short_names(measured(model, plan)) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


def test_the_same_linears_of_all_experts_of_a_block_are_a_unit(tmp_path: Path) -> None:
    model, plan = opened("mixtral", tmp_path)
    units = short_names(measured(model, plan))
    assert tuple(f"mlp.experts.{number}.w2" for number in range(4)) in units
    assert sum("experts" in name for unit in units for name in unit) == 4 * 3


def test_linears_of_one_input_are_found_where_the_architecture_has_no_row(tmp_path: Path) -> None:
    # given OPT-350m, whose norms come after what they would feed
    model, plan = opened("opt-350m", tmp_path)
    units = short_names(measured(model, plan), "model.decoder.layers.0")
    assert {frozenset(unit) for unit in units} >= {frozenset(f"self_attn.{x}_proj" for x in "qkv")}


def test_the_loss_is_the_change_of_the_blocks_output_as_a_share_of_it(tmp_path: Path) -> None:
    model, plan = opened("llama", tmp_path)
    unit = next(unit for unit in measured(model, plan) if unit.linears == (f"{BLOCK}.mlp.down_proj",))
    option = next(option for option in unit.options if option.grouping == Grouping(4, 32))

    # the same by hand: the down projection adds its output to the states
    block = model.load_block(0)
    with torch.no_grad():
        (chunk,) = model.embed(TOKENS)
        before = run_block(block, 0, chunk).hidden
        weight = linear_of(block, "mlp.down_proj").weight
        weight.copy_(round_plainly(weight, 32, 4))
        after = run_block(block, 0, chunk).hidden
    expected = ((after - before).norm(dim=-1) / before.norm(dim=-1)).square().mean()
    assert option.loss == pytest.approx(float(expected), rel=1e-4)
    assert option.num_bits == 64 * 128 * 4 + 64 * 4 * 20


def test_more_bits_lose_less(tmp_path: Path) -> None:
    model, plan = opened("llama", tmp_path)
    for unit in measured(model, plan):
        losses = {option.grouping: option.loss for option in unit.options}
        assert losses[Grouping(8, WHOLE_ROW)] < losses[Grouping(4, 32)] / 50


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    model, plan = opened("llama", tmp_path)
    before = model.load_block(0).state_dict()
    measured(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.load_block(0).state_dict().items())


def test_all_linears_of_a_unit_get_the_same(tmp_path: Path) -> None:
    model, plan = opened("llama", tmp_path)
    units = measured(model, plan)
    num_weights = sum(linear_of(model.model, name).weight.numel() for name in plan.block_groupings())

    groupings = mixture_of(units, int(5.5 * num_weights))

    assert groupings.keys() == plan.block_groupings().keys()
    assert len(set(groupings.values())) > 1
    for unit in units:
        assert len({groupings[name] for name in unit.linears}) == 1


def test_a_sample_is_spread_over_the_rows_and_bounded() -> None:
    rows = torch.arange(32)[:, None].expand(32, 128)
    assert sample_of(rows)[:, 0].tolist() == [0, 8, 16, 24]
    assert sample_of(torch.zeros(3, 2048)).shape == (1, 512)
    assert sample_of(torch.zeros(2, 16)).shape == (2, 16)
