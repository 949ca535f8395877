"""What was seen of a block's twins is not run for again, and nothing that is seen differs for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from quant.block_pair import CurrentBlock, OriginalBlock
from quant.capture import BlockInput, ClosedChild, embed, observe, run_block, running_order
from quant.device import HOST
from quant.fast_products import fast_products, product_dtype
from quant.kept_tensors import Scratch
from quant.model_structure import find_blocks
from tests.quant.tiny_families import VARIANTS, open_tiny

ATTENTION = ClosedChild("self_attn", "self_attn.o_proj", 1)
# two chunks
TOKENS = torch.arange(60 * 40).view(60, 40) * 7 % 256


@pytest.fixture(autouse=True)
def run_as_quantizations_do() -> Iterator[None]:
    with fast_products():
        yield


def open_block(directory: Path, name: str = "llama") -> tuple[nn.Module, list[BlockInput]]:
    model = open_tiny(next(variant for variant in VARIANTS if variant.name == name), directory)
    stack = find_blocks(model)
    return next(iter(stack.blocks.values())), list(embed(stack, TOKENS))


@contextmanager
def counting(module: nn.Module) -> Iterator[list[str]]:
    runs: list[str] = []
    hook = module.register_forward_hook(lambda *_: runs.append("run"))
    yield runs
    hook.remove()


@torch.no_grad()
def test_the_original_is_run_once_for_its_outputs_and_for_all_that_is_asked_later(tmp_path: Path) -> None:
    block, chunks = open_block(tmp_path)
    expected = observe(block, 0, chunks[1], ["mlp.down_proj"], ["mlp.down_proj"])
    with counting(block.get_submodule("mlp")) as runs:
        original = OriginalBlock.run(block, 0, chunks, ["mlp.down_proj"], ["mlp.down_proj"], Scratch(tmp_path))
        seen = original.observe(1, ["mlp.down_proj"], ["mlp.down_proj"])
    assert len(runs) == len(chunks) == 2
    assert torch.equal(original.outputs[1].hidden, run_block(block, 0, chunks[1]).hidden)
    read = expected.inputs["mlp.down_proj"]
    assert torch.equal(seen.inputs["mlp.down_proj"], read.to(product_dtype(HOST)).float())
    assert torch.equal(seen.outputs["mlp.down_proj"], expected.outputs["mlp.down_proj"])


@torch.no_grad()
@pytest.mark.parametrize("memory_bytes", [0, 2**29])
def test_only_the_end_of_what_is_settled_runs_again_and_gives_the_same(memory_bytes: int, tmp_path: Path) -> None:
    # given memory for all that is noted, or for none of it
    block, chunks = open_block(tmp_path)
    current = CurrentBlock(block, 0, chunks, Scratch(tmp_path, memory_bytes))
    current.settle([ATTENTION])
    current.run(1)
    # and a change of the linear at the end of attention
    block.get_submodule("self_attn.o_proj").get_parameter("weight").mul_(2)
    expected = run_block(block, 0, chunks[1]).hidden

    with counting(block.get_submodule("self_attn.q_proj")) as runs:
        output = current.run(1).hidden
        seen = current.observe(1, ["self_attn.o_proj"], ["self_attn.o_proj"])

    assert torch.equal(output, expected)
    assert torch.equal(seen.outputs["self_attn.o_proj"], block.get_submodule("self_attn.o_proj")(*seen.inputs.values()))
    assert not runs
    # and the block itself is as it was
    assert "forward" not in vars(block.get_submodule("self_attn"))
    assert torch.equal(run_block(block, 0, chunks[1]).hidden, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "closings"),
    [
        ("llama", {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}),
        ("qwen3-moe", {"self_attn": "self_attn.o_proj"}),
        ("falcon-7b", {"self_attention": "self_attention.dense", "mlp": "mlp.dense_4h_to_h"}),
        ("opt", {"self_attn": "self_attn.out_proj", "fc1": "fc1", "fc2": "fc2"}),
    ],
)
def test_what_ends_with_a_linear_is_found_in_the_order_it_runs(
    name: str, closings: dict[str, str], tmp_path: Path
) -> None:
    block, chunks = open_block(tmp_path, name)
    order = running_order(block, 0, chunks[0])
    assert {child.name: child.closing for child in order if isinstance(child, ClosedChild)} == closings
    current = CurrentBlock(block, 0, chunks, Scratch())
    current.settle([child for child in order if isinstance(child, ClosedChild)])
    first, again = current.run(0), current.run(0)
    assert torch.equal(first.hidden, run_block(block, 0, chunks[0]).hidden)
    assert torch.equal(again.hidden, first.hidden)
