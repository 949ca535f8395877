"""From rows of data to the groups of a block: every linear in one, every reader of a scaled input in its group."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from quant.block_groups import ScaleGroup, groups_of, share_inputs
from quant.capture import embed, run_block
from quant.model_structure import find_blocks
from quant.scale_fold import fold
from quant.scale_groups import GroupRow, Outputs, rows_of
from quant.scale_search import ChannelSpread
from tests.quant.tiny_families import HEAD_WIDTH, TOKENS, VARIANTS, Variant, open_tiny

BY_NAME = {variant.name: variant for variant in VARIANTS}
ROUTERS = {"mlp.gate", "mlp.shared_expert_gate"}


def groups_by_source(variant: Variant, model: PreTrainedModel, index: int = 0) -> dict[str | None, ScaleGroup]:
    block = list(find_blocks(model).blocks.values())[index]
    groups = groups_of(block, rows_of(variant.model_type), model.config)
    return {group.source.name if group.source else None: group for group in groups}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_linear_of_a_block_is_in_one_group_but_routers_and_gates(variant: Variant, tmp_path: Path) -> None:
    model = open_tiny(variant, tmp_path)
    for block in find_blocks(model).blocks.values():
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        grouped = [
            name for group in groups_of(block, rows_of(variant.model_type), model.config) for name in group.linears
        ]
        assert sorted(grouped) == sorted(set(linears) - ROUTERS)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_fold_that_forgets_any_one_reader_changes_the_block(variant: Variant, tmp_path: Path) -> None:
    """So a group lists nothing that does not read its input. That it lists all, the exact fold says."""
    model = open_tiny(variant, tmp_path)
    stack = find_blocks(model)
    block = next(iter(stack.blocks.values()))
    with torch.no_grad():
        chunk = next(embed(stack, TOKENS))
        expected = run_block(block, 0, chunk).hidden
        for group in groups_of(block, rows_of(variant.model_type), model.config):
            for reader in (*group.linears, *group.kept) if group.source else ():
                folded = copy.deepcopy(block)
                scale = torch.linspace(0.3, 3, folded.get_submodule(reader).weight.shape[1] // group.spread.repeats)
                fold(folded, group, scale)
                torch.testing.assert_close(run_block(folded, 0, chunk).hidden, expected, rtol=1e-3, atol=1e-3)
                folded.get_submodule(reader).weight.copy_(block.get_submodule(reader).weight)
                assert not torch.allclose(run_block(folded, 0, chunk).hidden, expected, rtol=1e-2, atol=1e-2), reader


def test_value_heads_that_several_query_heads_read_are_scaled_together(tmp_path: Path) -> None:
    groups = groups_by_source(BY_NAME["llama"], open_tiny(BY_NAME["llama"], tmp_path))
    assert groups["self_attn.v_proj"].spread == ChannelSpread(width=HEAD_WIDTH, repeats=2)


def test_the_values_of_a_fused_projection_are_found_with_fewer_key_heads_than_query_heads(tmp_path: Path) -> None:
    # 4 query heads and 2 key and value heads of 16: rows 0 to 63 are queries, 64 to 95 keys, 96 to 127 values
    group = groups_by_source(BY_NAME["phi3"], open_tiny(BY_NAME["phi3"], tmp_path))["self_attn.qkv_proj"]
    assert group.source is not None
    assert (group.source.run, group.source.period) == (32, 128)
    assert group.spread == ChannelSpread(width=HEAD_WIDTH, repeats=2)


def test_routers_are_compensated_and_see_every_token(tmp_path: Path) -> None:
    group = groups_by_source(BY_NAME["qwen2-moe"], open_tiny(BY_NAME["qwen2-moe"], tmp_path))[
        "post_attention_layernorm"
    ]
    assert group.kept == ("mlp.gate", "mlp.shared_expert_gate")
    assert group.observed == "mlp.gate"
    assert len(group.linears) == 2 * (4 + 1)


def test_a_block_without_experts_among_blocks_with_them_has_plain_groups(tmp_path: Path) -> None:
    variant = BY_NAME["qwen2-moe-dense-block"]
    group = groups_by_source(variant, open_tiny(variant, tmp_path), index=1)["post_attention_layernorm"]
    assert (group.linears, group.kept) == (("mlp.gate_proj", "mlp.up_proj"), ())


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("opt-350m", {"self_attn_layer_norm", "final_layer_norm"}),
        ("galactica", {"fc1"}),
        ("gemma3", {"input_layernorm"}),
        ("falcon-rw", {"ln_attn"}),
    ],
)
def test_what_cannot_be_scaled_exactly_is_no_source(name: str, absent: set[str], tmp_path: Path) -> None:
    sources = groups_by_source(BY_NAME[name], open_tiny(BY_NAME[name], tmp_path)).keys()
    assert sources
    assert not sources & absent


def test_an_architecture_without_a_row_has_a_group_a_linear_and_no_source(tmp_path: Path) -> None:
    model = open_tiny(BY_NAME["llama"], tmp_path)
    block = next(iter(find_blocks(model).blocks.values()))
    groups = groups_of(block, (), model.config)
    assert all(group.source is None and len(group.linears) == 1 for group in groups)
    assert len(groups) == 7


def test_linears_without_a_row_that_read_one_tensor_are_joined(tmp_path: Path) -> None:
    model = open_tiny(BY_NAME["llama"], tmp_path)
    stack = find_blocks(model)
    block = next(iter(stack.blocks.values()))
    with torch.no_grad():
        chunk = next(embed(stack, TOKENS))
        groups = share_inputs(groups_of(block, (), model.config), block, 0, chunk)
    assert [group.linears for group in groups] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ]


def test_joining_inputs_leaves_no_linear_out_and_no_scaled_group_changed(tmp_path: Path) -> None:
    model = open_tiny(BY_NAME["opt-350m"], tmp_path)
    stack = find_blocks(model)
    block = next(iter(stack.blocks.values()))
    groups = groups_of(block, rows_of("opt"), model.config)
    with torch.no_grad():
        shared = share_inputs(groups, block, 0, next(embed(stack, TOKENS)))
    assert {name for group in shared for name in group.linears} == {name for group in groups for name in group.linears}
    assert [group for group in shared if group.source] == [group for group in groups if group.source]


def test_linears_that_are_called_like_a_router_are_left_alone_without_a_row(tmp_path: Path) -> None:
    router = nn.ModuleDict({"wg": nn.Linear(64, 8)})
    block = nn.ModuleDict({"gate": router, "shared_expert_gate": nn.Linear(64, 8), "up": nn.Linear(64, 64)})
    groups = groups_of(block, (), open_tiny(BY_NAME["llama"], tmp_path).config)
    assert [group.linears for group in groups] == [("up",)]


def test_shapes_that_do_not_say_how_heads_repeat_are_not_folded(tmp_path: Path) -> None:
    block = nn.ModuleDict({"v_proj": nn.Linear(48, 24), "o_proj": nn.Linear(80, 48)})
    row = GroupRow("v_proj", ("o_proj",), outputs=Outputs.ALL)
    config = open_tiny(BY_NAME["llama"], tmp_path).config
    groups = groups_of(block, (row,), config)
    assert all(group.source is None for group in groups)
