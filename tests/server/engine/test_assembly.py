"""How an engine is wired: what a step may hold by device, and what is refused before any weight is read."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.assembly import assemble_engine, choose_limits
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.scheduler import SchedulerLimits

CPU = torch.device("cpu")


def test_on_a_cpu_a_step_holds_a_short_chunk_of_a_prompt_beside_everybody_else() -> None:
    limits = choose_limits(EngineConfig("m", max_num_seqs=16), CPU)
    assert limits == SchedulerLimits(16, 272, prefill_chunk=256)


def test_on_a_gpu_a_step_holds_much_and_a_prompt_is_cut_anywhere() -> None:
    limits = choose_limits(EngineConfig("m", max_num_seqs=16), torch.device("cuda"))
    assert limits == SchedulerLimits(16, 2048)


@pytest.mark.parametrize(("budget", "chunk"), [(16, 1), (17, 2), (200, 128), (271, 256), (4096, 256)])
def test_a_budget_that_is_set_leaves_a_prompt_what_the_others_do_not_need(budget: int, chunk: int) -> None:
    limits = choose_limits(EngineConfig("m", max_num_seqs=16, max_num_batched_tokens=budget), CPU)
    assert limits == SchedulerLimits(16, budget, prefill_chunk=chunk)


def test_a_budget_below_one_token_a_sequence_is_refused_on_a_cpu_too() -> None:
    with pytest.raises(EngineSetupError, match="max_num_batched_tokens is 15"):
        choose_limits(EngineConfig("m", max_num_seqs=16, max_num_batched_tokens=15), CPU)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"kv_cache_bytes": 1000}, "kv_cache_memory, which is 1000"),
        ({"max_model_len": 100_000}, "max_model_len is 100000"),
        ({"num_threads": 100_000}, f"num_threads is 100000, but there are {os.cpu_count()} CPUs"),
    ],
)
def test_what_the_config_alone_contradicts_is_refused_before_the_weights_are_read(
    tiny_model: Path, tmp_path: Path, setting: dict[str, int], words: str
) -> None:
    # given a model without weights, whose loading would say something else
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    config = replace(EngineConfig(str(tmp_path), device="cpu"), **setting)
    with pytest.raises(EngineSetupError, match=words):
        assemble_engine(config, lambda progress: None, lambda news: None)
