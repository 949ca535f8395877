"""What weights, work and cache take of a memory, and what is said where that is too little. No GPU is asked."""

from pathlib import Path

import pytest
import torch

from quant.checkpoint.reader import CheckpointReader
from server.engine import host_memory
from server.engine.assembly import assemble_engine
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.graph_sizes import GraphSize
from server.engine.memory_plan import (
    DeviceMemory,
    cache_budget,
    check_gpu_fits,
    check_host_fits,
    graph_bytes,
    weight_bytes,
    workspace_bytes,
)
from server.model.config import read_model_config
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

GIB = 2**30
CONFIG = EngineConfig("model", gpu_memory_utilization=0.75)


def test_dense_weights_count_in_the_dtype_they_get_and_packed_ones_as_they_are(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    dense = CheckpointReader.open(directory)
    num_weights = 272 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    num_norms = 5 * 64
    assert weight_bytes(dense, torch.bfloat16) == 2 * (num_weights + num_norms)
    assert weight_bytes(dense, None) == weight_bytes(dense, torch.float32) == 4 * (num_weights + num_norms)

    quantize_in_place(directory, lambda name: name.endswith("down_proj"))
    packed = CheckpointReader.open(directory)
    num_packed = 2 * 64 * 128
    # 4 bits a weight; for 32 of them 16 bits of scale and 4 of zero point
    assert weight_bytes(packed, torch.bfloat16) == 2 * (num_weights + num_norms - num_packed) + num_packed * (
        32 * 4 + 16 + 4
    ) // (32 * 8)


def test_a_step_works_on_a_layers_activations_and_on_logits(tmp_path: Path) -> None:
    model = read_model_config(save_tiny_model("llama", tmp_path))
    few = workspace_bytes(model, torch.bfloat16, max_num_tokens=100, max_num_drawn=3)
    # the stream three times, 8 heads of 16, what 4 of them attend to, three times the MLP's width
    activations = 2 * (3 * 64 + 8 * 16 + 4 * 16 + 3 * 128)
    assert few == 100 * activations + 3 * 3 * 272 * 4


def test_a_mixture_works_on_the_activations_of_the_experts_that_a_token_chose(tmp_path: Path) -> None:
    model = read_model_config(save_tiny_model("qwen2_moe", tmp_path))
    assert model.moe is not None
    assert model.moe.shared_intermediate_size is not None
    chosen = model.moe.num_experts_per_tok * (3 * model.moe.intermediate_size + 64)
    mixture = chosen + 3 * model.moe.shared_intermediate_size
    assert mixture > 3 * model.intermediate_size
    step = workspace_bytes(model, torch.bfloat16, max_num_tokens=100, max_num_drawn=0)
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    assert step == 100 * 2 * (3 * 64 + heads + mixture)


@pytest.mark.parametrize(
    ("free", "workspace", "expected"),
    [
        # of 16 GiB 12 may be used, and 6 are
        (10 * GIB, 0, 6 * GIB),
        (10 * GIB, 2 * GIB, 4 * GIB),
        (10 * GIB, 7 * GIB, 0),
        (3 * GIB, 0, 0),
    ],
)
def test_the_cache_gets_what_others_weights_and_work_leave(free: int, workspace: int, expected: int) -> None:
    assert cache_budget(DeviceMemory(16 * GIB, free), 0.75, workspace) == expected


def test_weights_that_a_gpu_has_no_room_for_are_refused_with_the_numbers_to_change() -> None:
    memory = DeviceMemory(total=16 * GIB, free=15 * GIB)
    check_gpu_fits(10 * GIB, GIB, memory, CONFIG)
    words = (
        r"weights take 10\.5 GiB and a step's work 1\.0 GiB, but gpu_memory_utilization 0\.75 leaves 11\.0 GiB: .*"
        r"16\.0 GiB 15\.0 are free\. Raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs"
    )
    with pytest.raises(EngineSetupError, match=words):
        check_gpu_fits(10 * GIB + GIB // 2, GIB, memory, CONFIG)


def test_weights_that_a_cpu_has_no_room_for_are_refused() -> None:
    check_host_fits(GIB, GIB)
    with pytest.raises(EngineSetupError, match=r"weights take 2\.0 GiB, but 1\.0 GiB of memory are free: .*dtype"):
        check_host_fits(2 * GIB, GIB)


def test_an_engine_without_room_for_its_weights_does_not_load_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100_000)
    config = EngineConfig(str(save_tiny_model("llama", tmp_path)), device="cpu", kv_cache_bytes=2**20)
    layers: list[object] = []
    with pytest.raises(EngineSetupError, match="the weights take"):
        assemble_engine(config, layers.append, lambda news: None)
    assert layers == []


def test_recorded_steps_take_memory_for_their_launches_and_once_what_the_largest_computes_in(tmp_path: Path) -> None:
    model = read_model_config(save_tiny_model("llama", tmp_path))
    assert graph_bytes(model, ()) == 0
    # 4 heads of 16, and two numbers for each: of 8 sequences 16 spans of 512 tokens, or of 64 one
    spans = 4 * 4 * 18 * max(8 * 16, 64)
    work = workspace_bytes(model, torch.float32, max_num_tokens=64, max_num_drawn=0)
    launches = 2 * 2 * 2**19
    assert graph_bytes(model, (GraphSize(64, 512), GraphSize(8, 8192))) == launches + spans + work
