"""The decoder on the Triton kernels, interpreted, gives the greedy tokens of the CPU's kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kernels.dispatch import TRITON_ON_CPU
from tests.server.model.greedy_tokens import Generated, generate
from tests.server.model.quantized_models import TENSOR_FILE, quantize_in_place
from tests.tiny_models import save_tiny_model

# with a norm of heads; with a window that the longest prompt outgrows, soft caps, GELU gates and norms that multiply by
# 1 + w; with experts and one that is shared; with heads that turn in part and by neighbouring pairs; with layer norms
# and attention beside the MLP. The last two are short: what else is in their layers, the first have
MODELS: dict[str, dict[str, object]] = {
    "qwen3": {},
    "gemma2": {},
    "qwen2_moe": {},
    "glm4": {"num_hidden_layers": 1},
    "cohere": {"num_hidden_layers": 1},
}
# what rounding to halves may move a logit by, of a spread of 1: two layers of eight roundings, 2**-11 of the value each
MARGIN = 0.01
KERNELS = (
    "gemv_int4",
    "paged_attention",
    "fused_norm",
    "fused_rotary",
    "fused_activation",
    "fused_embedding",
    "fused_routing",
    "grouped_int4",
)


def everything(module_name: str) -> bool:
    return True


def clear_prompts(directory: Path) -> tuple[int, Generated]:
    """The first seed of prompts whose continuations the CPU chooses with a margin that rounding cannot turn."""
    for seed in range(50):
        generated = generate(directory, torch.float32, seed)
        if generated.margin > MARGIN:
            return seed, generated
    raise AssertionError("no prompts with a clear continuation")


@pytest.mark.timeout(900)
def test_greedy_tokens_are_those_of_the_cpu(tmp_path: Path) -> None:
    # given packed checkpoints, and the dense ones that they stand for
    for model_type, fields in MODELS.items():
        packed = save_tiny_model(model_type, tmp_path / "packed" / model_type, config_overrides=fields)
        dense = save_tiny_model(model_type, tmp_path / "dense" / model_type, config_overrides=fields)
        save_file(quantize_in_place(packed, everything), dense / TENSOR_FILE, metadata={"format": "pt"})

    # when the CPU runs the dense ones in float32, and a process that interprets Triton the packed ones in halves
    expected = {model_type: clear_prompts(tmp_path / "dense" / model_type) for model_type in MODELS}
    asked = [(str(seed), str(tmp_path / "packed" / model_type)) for model_type, (seed, _) in expected.items()]
    printed = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.server.model.greedy_tokens",
            "float16",
            *(word for pair in asked for word in pair),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", TRITON_ON_CPU: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )

    # then both choose the same tokens, and the Triton kernels chose theirs
    assert printed.returncode == 0, printed.stderr
    found = json.loads(printed.stdout)
    assert found["tokens"] == [generated.tokens for _, generated in expected.values()]
    assert {f"kernels.{name}" for name in KERNELS} <= set(found["modules"])


def test_a_cpu_without_an_interpreter_is_told_so() -> None:
    program = "import torch; from kernels import dispatch; dispatch.silu_gate(torch.ones(1, 4).half())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    refused = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, TRITON_ON_CPU: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert refused.returncode == 1
    assert "the Triton kernels read CUDA tensors, not tensors on cpu" in refused.stderr
