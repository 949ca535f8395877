"""The whole quantization on another device than the CPU: nothing is read from the wrong one, and no bit changes.

The device is a pretend one (pretend_device.py), in a process of its own: torch never forgets it again.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quant.test_resume import weights_of

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("rtn", "gptq", "awq", "awq+gptq", "mixed", "experts", "out of memory")
ON_BOTH = """
import json, sys
from dataclasses import replace
from pathlib import Path

import torch
from tests.quant.pretend_device import DEVICE, MEMORY, MixedDevicesError
from quant.device import Gpu
from quant.device_name import DeviceName
from quant.errors import DeviceFull
from quant.pipeline import quantize
from quant.progress import ignore_progress
from quant.recipe import Method, Recipe
from tests.quant.tiny_families import VARIANTS
from tests.tiny_models import save_tiny_model

folder = Path(sys.argv[1])
DEFAULT = Recipe(num_samples=4, sample_tokens=32, num_windows=1)
facts = {"reports": {}, "notices": {}}


def find():
    return Gpu(DEVICE, "Pretend GPU", MEMORY.limit_bytes)


def save(variant_name, num_blocks):
    variant = next(variant for variant in VARIANTS if variant.name == variant_name)
    fields = {**variant.fields, "num_hidden_layers": num_blocks}
    return save_tiny_model(variant.model_type, folder / variant_name, config_overrides=fields)


def run(name, recipe, model, listener=ignore_progress):
    heard = []
    report = quantize(recipe, model, folder / name, listener, heard.append, find=find)
    facts["reports"][name], facts["notices"][name] = report.to_json(), heard


def on_both(name, recipe, model):
    run(f"{name} cpu", replace(recipe, device=DeviceName.CPU), model)
    before = MEMORY.num_operations
    run(f"{name} pretend", replace(recipe, device=DeviceName.CUDA), model)
    facts["reports"][f"{name} pretend"]["num_operations"] = MEMORY.num_operations - before


try:
    torch.zeros(2).to(DEVICE) + torch.zeros(2)
except MixedDevicesError as error:
    facts["refusal"] = str(error)

llama = save("llama", 2)
for method in (Method.RTN, Method.GPTQ, Method.AWQ, Method.AWQ_GPTQ):
    on_both(method.value, DEFAULT.with_method(method), llama)
limit, MEMORY.limit_bytes = MEMORY.limit_bytes, 2**29
on_both("mixed", replace(DEFAULT.with_method(Method.AWQ), target_bpw=5.0, lm_head=8), llama)
MEMORY.limit_bytes = limit
on_both("experts", DEFAULT, save("qwen2-moe", 1))


def fill(phase, done, total, seconds_left):
    if (phase, done) == ("quantize", 1):
        MEMORY.limit_bytes = MEMORY.num_bytes


recipe = replace(DEFAULT.with_method(Method.RTN), device=DeviceName.CUDA)
run("out of memory cpu", replace(recipe, device=DeviceName.CPU), llama)
limit = MEMORY.limit_bytes
try:
    run("out of memory pretend", recipe, llama, fill)
except DeviceFull as error:
    facts["full"] = [str(error), error.exit_code, (folder / "out of memory pretend").exists()]
MEMORY.limit_bytes = limit
run("out of memory pretend", recipe, llama)
(folder / "facts.json").write_text(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints made on the CPU and on the pretend device, and facts.json, which says what else was seen."""
    made = tmp_path_factory.mktemp("pretend")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_BOTH, made], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return made


@pytest.fixture(scope="module")
def facts(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    found: dict[str, dict[str, dict[str, object]]] = json.loads((folder / "facts.json").read_text())
    return found


def test_the_pretend_device_refuses_what_a_gpu_refuses(facts: dict[str, object]) -> None:
    assert facts["refusal"] == "aten::add reads tensors of both devices: [2] on pretend:0, [2] on cpu"


@pytest.mark.parametrize("name", RUNS)
def test_the_device_changes_no_byte(folder: Path, name: str) -> None:
    assert weights_of(folder / f"{name} pretend") == weights_of(folder / f"{name} cpu")


@pytest.mark.parametrize("name", RUNS[:-1])
def test_the_work_is_done_on_the_device_and_the_report_says_so(facts: dict[str, dict], name: str) -> None:
    report, on_cpu = facts["reports"][f"{name} pretend"], facts["reports"][f"{name} cpu"]
    assert report["num_operations"] > 100
    assert (report["device"], on_cpu["device"]) == ("Pretend GPU", "cpu")
    assert report["peak_device_bytes"] > 0
    assert on_cpu["peak_device_bytes"] is None
    # what is measured through the output head, on the device, is the same as well
    assert report["held_out"] == on_cpu["held_out"]
    # with less room than is left to a GPU's libraries, text by the model is written on the host
    room = "0.5" if name == "mixed" else "1099.5"
    assert facts["notices"][f"{name} pretend"] == [f"quantizing on Pretend GPU, which has {room} GB of memory free"]
    assert facts["notices"][f"{name} cpu"] == []


def test_a_gpu_that_fills_up_ends_the_run_in_a_sentence_and_the_same_command_goes_on(facts: dict[str, dict]) -> None:
    sentence, exit_code, is_written = facts["full"]
    assert sentence.startswith("Pretend GPU has no memory left for a block of this model: end other programs that use")
    assert "the same command goes on after the last finished block; --device cpu does without" in sentence
    assert (exit_code, is_written) == (1, False)
    assert facts["notices"]["out of memory pretend"][-1] == "resuming at block 2 of 2: an earlier run ended there"
