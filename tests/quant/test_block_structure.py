"""What is found out by running a block is found once for all blocks that are built alike."""

from pathlib import Path

import pytest
import torch

from quant import block_structure
from quant.block import BlockPlan
from quant.block_groups import groups_of
from quant.block_structure import BlockStructures
from quant.capture import embed
from quant.method import STEPS, Method
from quant.model_structure import find_blocks
from quant.residual import BLOCK, StreamWriter, find_stream_writers
from quant.scale_groups import rows_of
from quant.scale_search import Grouping
from tests.quant.tiny_families import VARIANTS, open_tiny

TOKENS = torch.arange(2 * 24).view(2, 24) * 7 % 256


@pytest.mark.parametrize(("changed", "num_tried"), [(None, 1), ("a factor", 2)])
def test_blocks_are_tried_once_for_each_way_to_build_them(
    changed: str | None, num_tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a model whose blocks add their outputs to the stream times a factor, the same in all or not
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == "granite"), tmp_path)
    stack = find_blocks(model)
    blocks = list(stack.blocks.values())
    if changed is not None:
        blocks[1].residual_multiplier = 0.5
    tried = []

    def counted(*arguments: object) -> dict[str, StreamWriter]:
        tried.append(arguments)
        return find_stream_writers(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(block_structure, "find_stream_writers", counted)
    structures = BlockStructures()
    with torch.no_grad():
        chunk = next(embed(stack, TOKENS))
        for index, block in enumerate(blocks):
            groups = groups_of(block, rows_of("granite"), model.config)
            plan = BlockPlan(groups, Grouping(4, 32), STEPS[Method.AWQ_GPTQ])
            plan = structures.complete(plan, block, index, chunk)

    assert len(tried) == num_tried
    assert plan.writers["mlp.down_proj"].reader == BLOCK
    assert plan.writers["mlp.down_proj"].multiplier == pytest.approx(0.3 if changed is None else 0.5, rel=1e-4)
    assert [child.name for child in plan.order] == ["input_layernorm", "self_attn", "post_attention_layernorm", "mlp"]


def test_where_no_weight_is_corrected_nothing_is_asked_about_the_stream(tmp_path: Path) -> None:
    model = open_tiny(VARIANTS[0], tmp_path)
    stack = find_blocks(model)
    block = next(iter(stack.blocks.values()))
    plan = BlockPlan(groups_of(block, rows_of("llama"), model.config), Grouping(4, 32), STEPS[Method.AWQ])
    with torch.no_grad():
        assert not BlockStructures().complete(plan, block, 0, next(embed(stack, TOKENS))).writers
