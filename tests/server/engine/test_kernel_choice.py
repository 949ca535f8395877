"""Which kernels a start takes on a CPU, what it says about it, and what it refuses."""

from pathlib import Path

import pytest
import torch

from server.engine.config import CpuKernel, DType, EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.kernel_choice import KernelChoice, choose_kernels
from tests.kernels.native_libraries import open_native
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("quantized"))
    quantize_in_place(directory, lambda name: True)
    return directory


def choose(
    directory: Path, cpu_kernel: CpuKernel, dtype: DType = "auto", block_size: int | None = None
) -> KernelChoice:
    config = EngineConfig(str(directory), cpu_kernel=cpu_kernel, dtype=dtype, block_size=block_size)
    return choose_kernels(config, CPU, directory)


@pytest.mark.parametrize("cpu_kernel", ["auto", "native"])
def test_native_kernels_are_taken_where_they_can_be(quantized: Path, cpu_kernel: CpuKernel) -> None:
    expected = open_native().name

    choice = choose(quantized, cpu_kernel)

    assert choice.native is not None
    assert choice.description == f"native, {expected}"


def test_torch_is_taken_where_it_is_asked_for(quantized: Path) -> None:
    assert choose(quantized, "torch") == KernelChoice(None, "torch, as cpu_kernel says")


def test_a_gpu_has_its_own(quantized: Path) -> None:
    assert choose_kernels(EngineConfig(str(quantized)), torch.device("cuda"), quantized).description == "triton"


def test_without_a_compiler_torch_is_taken_and_the_reason_is_told(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_native()
    monkeypatch.setenv("PATH", str(tmp_path))

    choice = choose(quantized, "auto")

    assert choice.native is None
    assert choice.description.startswith("torch, as the native kernels cannot be used: there is no C++ compiler")


@pytest.mark.parametrize(
    ("dtype", "block_size", "reason"),
    [("bfloat16", None, "dtype is bfloat16, and they compute in float32"), ("auto", 8, "block_size is 8, no multiple")],
)
def test_settings_that_they_do_not_take(quantized: Path, dtype: DType, block_size: int | None, reason: str) -> None:
    assert reason in choose(quantized, "auto", dtype, block_size).description
    with pytest.raises(EngineSetupError, match=f"cpu_kernel is native, but .* {reason}"):
        choose(quantized, "native", dtype, block_size)


def test_a_model_that_is_not_quantized_is_left_to_torch(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)

    assert "q_proj is not quantized" in choose(tmp_path, "auto").description
    with pytest.raises(EngineSetupError, match="q_proj is not quantized; use auto or torch"):
        choose(tmp_path, "native")
