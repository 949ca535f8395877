"""Where a quantization runs: the GPU where there is one with room, the CPU otherwise, and always said in a sentence."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import quant.device
from quant.cli import app
from quant.device import CUDA, HOST, Gpu, asked_gpu, choose_device, device_of, find_gpu, telling_when_full
from quant.device_memory import device_bytes
from quant.device_name import DeviceName
from quant.errors import DeviceFull, QuantizationError, RecipeError
from quant.method import Method
from quant.model_plan import plan_model
from quant.pipeline import quantize
from quant.recipe import Recipe
from quant.source import open_source
from tests.tiny_models import save_tiny_model

GIB = 2**30
GPU = Gpu(torch.device(CUDA, 0), "NVIDIA Test 24GB", 8 * GIB)


def none() -> None:
    """No GPU."""


def never() -> Gpu:
    raise AssertionError("nobody asked for a GPU")


def test_the_cpu_is_taken_without_a_look_at_the_gpu() -> None:
    gpu = asked_gpu(DeviceName.CPU, never)
    chosen = choose_device(DeviceName.CPU, gpu, 1)
    assert (chosen.device, chosen.name, chosen.notice) == (HOST, "cpu", None)


def test_auto_without_a_gpu_is_the_cpu_and_says_nothing() -> None:
    chosen = choose_device(DeviceName.AUTO, asked_gpu(DeviceName.AUTO, none), GIB)
    assert (chosen.device, chosen.notice) == (HOST, None)


def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"is cuda, and torch sees no GPU: .* use --device cpu") as refusal:
        asked_gpu(DeviceName.CUDA, none)
    assert (refusal.value.field, refusal.value.exit_code) == ("device", 2)


@pytest.mark.parametrize("asked", [DeviceName.AUTO, DeviceName.CUDA])
def test_a_gpu_with_room_is_taken_and_said(asked: DeviceName) -> None:
    chosen = choose_device(asked, asked_gpu(asked, lambda: GPU), 8 * GIB)
    assert (chosen.device, chosen.name) == (GPU.device, "NVIDIA Test 24GB")
    assert chosen.notice == "quantizing on NVIDIA Test 24GB, which has 8.6 GB of memory free"


def test_a_gpu_that_is_too_full_leaves_auto_the_cpu_and_says_why() -> None:
    chosen = choose_device(DeviceName.AUTO, GPU, 8 * GIB + 1)
    assert (chosen.device, chosen.name) == (HOST, "cpu")
    assert chosen.notice == (
        "quantizing on the CPU: NVIDIA Test 24GB has 8.6 GB of memory free, and the largest block takes about 8.6 GB; "
        "--device cuda tries it nonetheless"
    )
    assert choose_device(DeviceName.CUDA, GPU, 8 * GIB + 1).device == GPU.device


def test_a_gpu_that_cannot_even_be_asked_has_nothing_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quant.device, "check_usable", fail)
    gpu = find_gpu()
    assert gpu is not None
    assert gpu.free_bytes == 0


def test_a_machine_without_a_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_gpu() is None


def test_no_memory_left_on_a_gpu_is_a_sentence_that_says_what_to_do() -> None:
    chosen = choose_device(DeviceName.CUDA, GPU, 0)
    what_to_do = r"NVIDIA Test 24GB has no memory left .* --device cpu does without"
    with pytest.raises(DeviceFull, match=what_to_do) as full, telling_when_full(chosen):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert isinstance(full.value, QuantizationError)
    assert full.value.exit_code == 1


@pytest.mark.parametrize("sign", ["CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "CUDA error: out of memory"])
def test_what_a_gpus_libraries_have_no_memory_for_keeps_finished_blocks_too(sign: str) -> None:
    with pytest.raises(DeviceFull), telling_when_full(choose_device(DeviceName.CUDA, GPU, 0)):
        raise RuntimeError(sign)
    # and what is another error stays one, as does anything on the host
    with pytest.raises(RuntimeError, match="shapes"), telling_when_full(choose_device(DeviceName.CUDA, GPU, 0)):
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="CU"), telling_when_full(choose_device(DeviceName.CPU, None, 0)):
        raise RuntimeError(sign)


def test_a_gpu_that_cannot_be_used_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(RecipeError, match="the GPU cannot be used: other programs have filled it"):
        asked_gpu(DeviceName.CUDA, lambda: Gpu(GPU.device, "the GPU", 0))


def test_a_module_without_weights_is_on_the_host() -> None:
    assert device_of(torch.nn.SiLU()) == HOST
    assert device_of(torch.nn.Linear(2, 2, device="meta")).type == "meta"


def test_cuda_without_a_gpu_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="torch sees no GPU"):
        quantize(Recipe(device=DeviceName.CUDA), tmp_path / "no-model", tmp_path / "out", find=none)


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_the_command_line_ends_with_code_2_where_there_is_no_gpu(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = save_tiny_model("llama", tmp_path / "model")
    places = [str(model), str(tmp_path / "out")] if command == "quantize" else [str(model)]

    result = CliRunner().invoke(app, [command, *places, "--device", "cuda"])

    assert result.exit_code == 2
    assert "the device is cuda, and torch sees no GPU" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_whose_gpu_is_too_full_goes_on_the_cpu_with_one_notice(tmp_path: Path) -> None:
    # given a GPU with less room than what is reserved
    full = Gpu(GPU.device, GPU.name, GIB)
    heard: list[str] = []

    recipe = Recipe(method=Method.RTN, num_windows=0)
    model = save_tiny_model("llama", tmp_path / "model")
    report = quantize(recipe, model, tmp_path / "out", on_notice=heard.append, find=lambda: full)

    (sentence,) = heard
    assert sentence.startswith("quantizing on the CPU: NVIDIA Test 24GB has 1.1 GB of memory free")
    assert (report.device, report.peak_device_bytes) == ("cpu", None)


def test_the_memory_that_is_needed_follows_from_the_largest_block_the_method_and_the_head(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 1}
    model = open_source(save_tiny_model("llama", tmp_path, config_overrides=shape)).model

    def needed(recipe: Recipe) -> int:
        return device_bytes(model, plan_model(recipe, model))

    # the down projection's inputs are the widest
    square = 4 * 4096**2
    plain, searched, corrected = (needed(Recipe(method=method)) for method in (Method.RTN, Method.AWQ, Method.AWQ_GPTQ))
    assert plain < searched < corrected
    assert searched > plain + 3 * square
    assert corrected == searched + 2 * square
    # a small head takes less than the block
    assert needed(Recipe(lm_head=8)) == corrected
