"""What is compiled before an engine is ready: all that its steps can launch, for a GPU that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.dispatch import TRITON_ON_CPU
from server.engine.warm_up import WarmUpLimits, warm_up_plans
from tests.lora_adapters import save_adapter
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

LIMITS = WarmUpLimits(max_num_seqs=20, max_num_batched_tokens=300, max_model_len=100, vocab_size=272, block_size=16)


def test_steps_of_every_power_of_two_and_of_the_most_are_run() -> None:
    plans = warm_up_plans(LIMITS)
    lens = [plan.query_starts.tolist()[1:] for plan in plans]
    assert {starts[0] for starts in lens if len(starts) == 1} == {1, 2, 4, 8, 16, 32, 64, 100}
    assert {len(starts) for starts in lens if starts[0] == 1} == {1, 2, 4, 8, 16, 20}
    # three prompts of the longest context fill a step
    assert [100, 200, 300] in lens
    assert not any(plan.block_tables.any() for plan in plans)


@pytest.mark.timeout(900)
def test_no_step_needs_a_kernel_that_the_warm_up_does_not_compile(tmp_path: Path) -> None:
    # given a model with an adapter, and one with experts and a shared one
    dense, mixture = (save_tiny_model(kind, tmp_path / kind) for kind in ("llama", "qwen2_moe"))
    adapter = save_adapter(tmp_path / "adapter", dense, ("q_proj", "down_proj"))
    for directory in (dense, mixture):
        quantize_in_place(directory, lambda name: True)

    # when random steps are made with Triton's compiler for sm90, and nothing is launched
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, "-m", "tests.server.engine.absent_gpu", str(dense), str(adapter), str(mixture), ""],
        env={**environment, TRITON_ON_CPU: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )

    # then they need what the warm-up found, and no longer what was compiled
    assert printed.returncode == 0, printed.stderr
    of_dense, of_mixture = json.loads(printed.stdout)
    assert of_dense["told"] == [[1, 2], [2, 2]]
    assert set(of_dense["needed"]) - set(of_dense["left"]) == {"silu_gate_kernel", "gather_rows_kernel"}
    for found in (of_dense, of_mixture):
        assert found["besides"] == []
        assert {"gemv_int4_kernel", "decode_kernel", "prefill_kernel", "choose_tokens_kernel"} <= set(found["needed"])
    assert "lora_up_kernel" in of_dense["needed"]
    assert "grouped_int4_kernel" in of_mixture["needed"]
