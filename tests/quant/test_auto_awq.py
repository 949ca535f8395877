"""AutoAWQ's shape: scripts written for it quantize, save and load; what means nothing here is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import quant
from quant.auto_awq import AutoAWQForCausalLM, ModelToQuantize
from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, read_folded_scales
from quant.checkpoint.meta import CheckpointFormat
from quant.checkpoint.reader import CheckpointReader
from quant.errors import OutputError, QuantError, QuantizationError, RecipeError, SourceError
from tests.tiny_models import IM_END_ID, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The river rises in the hills. " * 4, "Trains leave on the hour. " * 4]
CONFIG = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
SMALL = {"max_calib_samples": 4, "max_calib_seq_len": 32}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def model(original: Path) -> ModelToQuantize:
    return AutoAWQForCausalLM.from_pretrained(original)


def test_a_script_for_autoawq_quantizes_saves_and_loads(original: Path, tmp_path: Path) -> None:
    # given what AutoAWQ's own example does
    model = AutoAWQForCausalLM.from_pretrained(str(original), low_cpu_mem_usage=True, use_cache=False)
    tokenizer = AutoTokenizer.from_pretrained(original)
    model.quantize(tokenizer, quant_config=CONFIG, calib_data=TEXTS, **SMALL)
    model.save_quantized(str(tmp_path / "tiny-awq"))
    tokenizer.save_pretrained(tmp_path / "tiny-awq")

    # then the checkpoint is as asked for, and its model generates until the end of a turn
    meta = CheckpointReader.open(tmp_path / "tiny-awq").meta
    assert meta is not None
    assert (meta.format, meta.bits, meta.group_size) == (CheckpointFormat.AWQ_GEMM, 4, 32)
    loaded = AutoAWQForCausalLM.from_quantized(tmp_path / "tiny-awq", fuse_layers=False)
    tokens = torch.tensor([tokenizer("Hello")["input_ids"]])
    assert loaded(tokens).logits.shape == (1, 5, 272)
    assert loaded.generate(tokens, max_new_tokens=3, do_sample=False).shape[1] in (6, 7, 8)
    assert IM_END_ID in loaded.generation_config.eos_token_id


def test_both_shapes_give_the_same_bytes(model: ModelToQuantize, tmp_path: Path) -> None:
    model.quantize(None, CONFIG, TEXTS, **SMALL)
    model.save_quantized(tmp_path / "one")
    model.quantize(calib_data=TEXTS, w_bit=4, q_group_size=32, version="gemm", **SMALL)
    model.save_quantized(tmp_path / "two")

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # with what is folded into them
    assert read_folded_scales(tmp_path / "one")
    assert len({(tmp_path / name / FOLDED_SCALES_FILE).read_bytes() for name in ("one", "two")}) == 1


def test_text_may_be_given_first(model: ModelToQuantize, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    model.quantize(str(tmp_path / "text.txt"), w_bit=4, q_group_size=64, version="GEMM", **SMALL)

    assert model.report is not None
    assert model.report.calibration is not None
    assert model.report.calibration.origins[0].name == "text.txt"


def test_the_saved_card_has_the_name_it_was_saved_under(model: ModelToQuantize, tmp_path: Path) -> None:
    model.quantize(calib_data=TEXTS, **SMALL)
    model.save_quantized(tmp_path / "my-awq")

    assert "\n# my-awq\n" in (tmp_path / "my-awq" / "README.md").read_text()
    assert json.loads((tmp_path / "my-awq" / "report.json").read_text())["recipe"]["calibration"] == "calib_data.jsonl"
    assert [path.name for path in tmp_path.iterdir()] == ["my-awq"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"duo_scaling": False}, r"quantize\(duo_scaling=False\) is not supported: scales .* leave it out"),
        ({"apply_clip": False}, r"apply_clip=False"),
        ({"split": "validation"}, r"split='validation'\) is not supported: give the split's text as a file"),
        ({"modules_to_not_convert": ["gate"]}, r"modules_to_not_convert=\['gate'\]"),
        ({"nonsense": 1}, r"quantize\(\) has no option nonsense"),
        ({"quant_config": {"w_bits": 4}}, r"quantize\(\) has no option w_bits"),
        ({"quant_config": CONFIG, "w_bit": 4}, r"w_bit in quant_config and beside it"),
        ({"zero_point": False}, r"zero_point=False\) is not supported"),
        ({"version": "GEMV"}, r"version='GEMV'\) is not supported: GEMM is written"),
        ({"w_bit": 5}, r"bits is 5; supported: 3, 4, 8"),
        ({"w_bit": "4"}, r"w_bit='4'\): it must be a whole number"),
        ({"q_group_size": 48}, r"group size is 48; supported: auto, 128, 64, 32, row"),
        ({"q_group_size": 0}, r"group size is 0; supported: auto, 128, 64, 32, row"),
        ({"calib_data": [[1, 2, 3]]}, r"a list must hold strings"),
        ({"calib_data": "no-such.txt"}, r"no-such\.txt is no file"),
        ({"calib_data": []}, r"calib_data\.jsonl has 0 tokens"),
        ({"tokenizer": "self", "calib_data": "self"}, r"calibration text twice"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_name(
    model: ModelToQuantize, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(QuantError, match=sentence):
        model.quantize(**arguments)


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {"safetensors": False}, {"attn": "flash"}], ids=str)
def test_loading_options_that_change_something_are_refused(original: Path, options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(RecipeError, match=name):
        AutoAWQForCausalLM.from_pretrained(original, **options)
    with pytest.raises(RecipeError, match=name):
        AutoAWQForCausalLM.from_quantized(original, **options)


@pytest.mark.parametrize("device_map", ["cuda:1", "balanced", {"": 0}], ids=str)
def test_a_device_map_that_spreads_the_model_is_refused(original: Path, device_map: object) -> None:
    with pytest.raises(RecipeError, match=r"device_map=.* one block at a time is on the device; give auto, cpu, cuda"):
        AutoAWQForCausalLM.from_pretrained(original, device_map=device_map)


def test_a_device_map_is_the_device_of_the_recipe(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_gpu = AutoAWQForCausalLM.from_pretrained(original, device_map="cuda")
    with pytest.raises(RecipeError, match="torch sees no GPU"):
        on_gpu.quantize(calib_data=TEXTS, **SMALL)
    on_cpu = AutoAWQForCausalLM.from_pretrained(original, device_map="cpu")
    on_cpu.quantize(calib_data=TEXTS, **SMALL)
    assert on_cpu.report is not None
    assert (on_cpu.report.recipe.device, on_cpu.report.device) == ("cpu", "cpu")


def test_the_tokenizer_of_another_model_is_refused(model: ModelToQuantize, original: Path) -> None:
    other = AutoTokenizer.from_pretrained(original)
    other.add_tokens(["<|another|>"])
    with pytest.raises(RecipeError, match="not the model's own"):
        model.quantize(other)


def test_nothing_is_saved_before_it_is_quantized(model: ModelToQuantize, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"call quantize\(\) before save_quantized\(\)"):
        model.save_quantized(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_failed_quantization_leaves_nothing_to_save(model: ModelToQuantize, tmp_path: Path) -> None:
    model.quantize(calib_data=TEXTS, **SMALL)
    with pytest.raises(RecipeError, match="need"):
        model.quantize(calib_data=["short"])
    with pytest.raises(QuantizationError, match=r"call quantize\(\)"):
        model.save_quantized(tmp_path / "out")


def test_an_output_that_exists_is_refused(model: ModelToQuantize, tmp_path: Path) -> None:
    model.quantize(calib_data=TEXTS, **SMALL)
    with pytest.raises(OutputError, match="exists already"):
        model.save_quantized(tmp_path)


def test_a_quantized_model_is_refused_when_it_is_opened(model: ModelToQuantize, tmp_path: Path) -> None:
    model.quantize(calib_data=TEXTS, **SMALL)
    model.save_quantized(tmp_path / "out")
    with pytest.raises(SourceError, match="quantized already"):
        AutoAWQForCausalLM.from_pretrained(tmp_path / "out")


def test_the_package_has_its_python_api_and_loads_no_torch_for_its_name() -> None:
    program = "import sys, quant, quant.checkpoint.location; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120).returncode == 0
    assert quant.AutoAWQForCausalLM is AutoAWQForCausalLM
    assert callable(quant.quantize)
    assert quant.Recipe(bits=4).bits == 4
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quant.nothing
