"""The real decoder on the Triton kernels, interpreted, recorded on a tape: the tokens that it gives without graphs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.dispatch import TRITON_ON_CPU
from tests.server.engine.graph_tokens import REQUESTS
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1}
# with norms of heads; with a window that the longest text outgrows, soft caps and float32 norms; with experts and one
# that is shared
MODELS = {
    "qwen3": {**SMALL, "num_hidden_layers": 1},
    "gemma2": {**SMALL, "sliding_window": 4},
    "qwen2_moe": {**SMALL, "num_hidden_layers": 1},
}


@pytest.mark.timeout(900)
def test_an_engine_with_graphs_gives_the_tokens_that_it_gives_without(tmp_path: Path) -> None:
    # given packed checkpoints
    for model_type, fields in MODELS.items():
        directory = save_tiny_model(model_type, tmp_path / model_type, config_overrides=fields)
        quantize_in_place(directory, lambda name: True)

    # when a process that interprets Triton runs them without graphs and with
    directories = [str(tmp_path / model_type) for model_type in MODELS]
    printed = subprocess.run(
        [sys.executable, "-m", "tests.server.engine.graph_tokens", *directories],
        env={**os.environ, "TRITON_INTERPRET": "1", TRITON_ON_CPU: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )

    # then every decoding step was replayed, and changed no token
    assert printed.returncode == 0, printed.stderr
    for found in json.loads(printed.stdout):
        assert found["replayed"] == found["eager"]
        assert {name: len(tokens) for name, tokens in found["eager"].items()} == {
            request.request_id: request.sampling.max_tokens for request in REQUESTS
        }
        # the first step reads the prompts
        assert found["num_replays"] == max(request.sampling.max_tokens for request in REQUESTS) - 1
        assert found["reports"] == [f"recording decoding graph {number} of 3" for number in (1, 2, 3)]
        assert found["kernels"] == "triton, decoding in 3 graphs"
