"""Disk space: hidden states are counted where memory does not keep them."""

from pathlib import Path

import pytest

from quant.checkpoint.stored_module import PackedSpec
from quant.disk_space import SMALLEST_LIST_BYTES, list_memory_bytes, planned_modules, scratch_bytes
from quant.kept_tensors import Scratch
from quant.method import Method
from quant.model_plan import plan_model
from quant.recipe import Recipe
from quant.rounding import SCALE_DTYPE
from quant.source import open_source
from tests.tiny_models import save_tiny_model


def linear(num_inputs: int) -> PackedSpec:
    return PackedSpec(64, num_inputs, 4, 32, SCALE_DTYPE)


@pytest.mark.parametrize(
    ("method", "num_samples", "on_disk"),
    [(Method.AWQ_GPTQ, 64, False), (Method.AWQ_GPTQ, 4096, True), (Method.RTN, None, False)],
)
def test_only_states_that_memory_does_not_keep_take_disk(
    method: Method, num_samples: int | None, on_disk: bool, tmp_path: Path
) -> None:
    model = open_source(save_tiny_model("llama", tmp_path / "model")).model
    recipe = Recipe(method=method, num_samples=num_samples, sample_tokens=None if num_samples is None else 128)
    planned = planned_modules(model, plan_model(recipe, model))
    num_bytes = scratch_bytes(recipe, model, planned)
    # a float32 for each token and channel of the stream, at least once
    width = model.config.hidden_size
    assert num_bytes >= 4096 * 128 * width * 4 if on_disk else num_bytes == 0


def test_lists_keep_less_in_memory_the_wider_the_sums_beside_them_are() -> None:
    sizes = [list_memory_bytes({"linear": linear(num_inputs)}) for num_inputs in (64, 1536, 4096, 11008, 28672)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(Scratch.memory_bytes, rel=0.01)
    assert sizes[-1] == SMALLEST_LIST_BYTES
