"""Bad input through the command line: one sentence that names what is wrong, an exit code, and nothing left behind."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from quant.checkpoint.reader import CheckpointReader
from quant.cli import app
from tests.tiny_models import read_config, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--calib-samples", "4", "--calib-seqlen", "32")
FAILED, REFUSED = 1, 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model("llama", tmp_path / "model")


def run(model: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["quantize", str(model), str(model.parent / "out"), *SMALL, *options])


def check_refused(result: Result, model: Path, exit_code: int, sentence: str) -> None:
    assert result.exit_code == exit_code, result.output
    assert sentence in result.stderr
    # no traceback, and neither a checkpoint nor a hidden folder
    assert "Traceback" not in result.stderr
    assert not [path for path in model.parent.iterdir() if "out" in path.name]


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path, **fields: object) -> None:
    (model / "config.json").write_text(json.dumps({**read_config(model), **fields}))


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    return change


def write_text(model: Path, content: str) -> str:
    (model.parent / "text.txt").write_text(content)
    return str(model.parent / "text.txt")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (set_value(UP, float("nan")), f"{UP} has 1 values that are not finite"),
        (set_value("model.norm.weight", float("-inf")), "model.norm.weight has 1 values that are not finite"),
        (lambda tensors: tensors.pop(UP), f"lacks tensors its config asks for: {UP} (1 in all)"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "holds tensors that its config has no place for: extra"),
        (lambda tensors: tensors.update({UP: torch.ones(64, 64)}), f"{UP} (as (128, 64), not (64, 64))"),
    ],
    ids=["nan", "infinity", "missing", "extra", "shape"],
)
def test_a_damaged_model_is_refused_by_the_tensors_name(
    model: Path, change: Callable[[dict[str, torch.Tensor]], None], sentence: str
) -> None:
    change_tensors(model, change)
    check_refused(run(model), model, REFUSED, sentence)


@pytest.mark.parametrize(
    ("calibration", "options", "sentence"),
    [
        ("text.txt:1", ("--no-eval",), "the input of model.layers.1.mlp.down_proj has"),
        ("text.txt:1", (), "the original cannot be measured: the output of model.layers.1.mlp.up_proj is not finite"),
        ("self", (), "the model cannot write its own text: the output of model.layers.1.mlp.up_proj is not finite"),
    ],
)
def test_activations_that_overflow_are_a_failure_by_the_linears_name(
    model: Path, monkeypatch: pytest.MonkeyPatch, calibration: str, options: tuple[str, ...], sentence: str
) -> None:
    # given weights that are finite one by one, and infinite in their product
    change_tensors(model, lambda tensors: tensors[UP].fill_(3e38))
    write_text(model, "The river rises in the hills. " * 20)
    monkeypatch.chdir(model.parent)

    result = run(model, "--calib", calibration, *options)

    check_refused(result, model, FAILED, sentence)


def test_a_quantized_model_is_no_source(model: Path) -> None:
    assert run(model, "--method", "awq", "--no-eval").exit_code == 0
    quantized = (model.parent / "out").rename(model.parent / "quantized")
    check_refused(run(quantized), model, REFUSED, "is quantized already (AWQ gemm); give the original model")


def test_tied_weights_are_written_once(model: Path) -> None:
    assert run(model, "--no-eval").exit_code == 0
    reader = CheckpointReader.open(model.parent / "out")
    assert reader.config["tie_word_embeddings"] is True
    assert "model.embed_tokens.weight" in reader.tensor_names
    assert "lm_head.weight" not in reader.tensor_names


def test_a_model_that_calls_its_head_its_own_and_has_none_is_refused(model: Path) -> None:
    change_config(model, tie_word_embeddings=False)
    check_refused(run(model), model, REFUSED, "lacks tensors its config asks for: lm_head.weight")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--group-size", "128"),
            "does not divide the 64 in features of model.layers.0.self_attn.q_proj; use 64",
        ),
        (("--group-size", "48"), "group size is 48; supported: auto, 128, 64, 32"),
        (("--calib", "missing.txt"), "calibration text missing.txt is no file; give a text file"),
        (("--calib", "wikitext:0.5,self:0.4"), "add up to 0.9; they must add up to 1"),
        (("--calib", "wikitext:0.9,self:0.1"), "give self with its share of 0.1 not one; use more samples"),
        (("--target-bpw", "4.1"), "the target is 4.1 bits per weight; with 4 bits a code or more"),
        (("--target-bpw", "5", "--format", "awq"), "the AWQ gemm format holds 4 bits only; use --format compressed"),
        (("--lm-head", "5"), "lm head is 5; supported: 8, 4, or left alone"),
        (
            ("--calib-seqlen", "513"),
            "reads at most 512 at once (max_position_embeddings); use --calib-seqlen 512 or less",
        ),
        (("--max-kl", "0"), "the highest KL is 0.0; it must be a number of nats above 0"),
        (("--max-kl", "nan"), "the highest KL is nan; it must be"),
        (("--max-kl", "1", "--no-eval"), "but nothing is measured"),
    ],
)
def test_an_option_that_cannot_be_is_refused(model: Path, options: tuple[str, ...], sentence: str) -> None:
    check_refused(run(model, *options), model, REFUSED, sentence)


def test_too_little_text_says_how_much_there_is_and_what_to_change(model: Path) -> None:
    text = write_text(model, "x" * 127)
    sentence = "text.txt has 127 tokens; 4 samples of 32 tokens need 128: give more text, or fewer or shorter samples"
    check_refused(run(model, "--calib", f"{text}:1"), model, REFUSED, sentence)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["directory", "file"])
def test_an_output_that_exists_is_kept_as_it_is(model: Path, make: Callable[[Path], None]) -> None:
    make(model.parent / "out")
    result = run(model)
    assert result.exit_code == REFUSED
    assert "out exists already; choose another place or remove it" in result.stderr
    assert [path.name for path in model.parent.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"model_type": "homemade", "auto_map": {"AutoModelForCausalLM": "modeling.Homemade"}},
            "needs code of its own for the architecture homemade (auto_map in config.json)",
        ),
        ({"model_type": "homemade"}, "homemade"),
    ],
    ids=["with its code", "without"],
)
def test_code_that_comes_with_a_model_is_never_run(model: Path, fields: Mapping[str, object], sentence: str) -> None:
    (model / "modeling.py").write_text(f"open({str(model.parent / 'ran')!r}, 'w')\n")
    change_config(model, **fields)
    check_refused(run(model), model, REFUSED, sentence)
    assert not (model.parent / "ran").exists()


def test_a_tokenizer_with_code_of_its_own_is_refused(model: Path) -> None:
    (model / "tokenization.py").write_text(f"open({str(model.parent / 'ran')!r}, 'w')\n")
    fields = json.loads((model / "tokenizer_config.json").read_text())
    fields |= {"tokenizer_class": "Homemade", "auto_map": {"AutoTokenizer": ["tokenization.Homemade", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    result = run(model, "--no-eval")
    assert not (model.parent / "ran").exists()
    check_refused(result, model, REFUSED, "it needs code of its own (auto_map), and code that comes with")


def test_a_result_worse_than_allowed_is_not_written(model: Path) -> None:
    result = run(model, "--max-kl", "1e-6")
    assert result.exit_code == FAILED
    assert (
        "nats on held-out text, and at most 1e-06 is allowed (--max-kl), so no checkpoint was written" in result.stderr
    )
    assert "Traceback" not in result.stderr
    assert not (model.parent / "out").exists()

    # and with another bound the same command goes on with the blocks it refused
    result = run(model, "--max-kl", "5")
    assert result.exit_code == 0, result.output
    assert "resuming after the last of 2" in result.stderr
    assert {path.name for path in model.parent.iterdir()} == {"model", "out"}


def test_a_result_as_good_as_allowed_is_written(model: Path) -> None:
    result = run(model, "--max-kl", "5")
    assert result.exit_code == 0, result.output
    assert "mean KL" in result.stdout
    assert "same first choice" in result.stdout
    measured = json.loads((model.parent / "out" / "report.json").read_text())["held_out"]
    assert 0 < measured["mean_kl"] < 5
    assert f"{measured['mean_kl']:.5f}" in (model.parent / "out" / "README.md").read_text()


def run_program(model: Path, *, largest_file: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
    """The program itself, whose files may not grow over largest_file bytes."""
    return subprocess.run(
        [sys.executable, "-m", "quant", "quantize", str(model), str(model.parent / "out"), *SMALL, "--no-eval"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_disk_that_fills_up_in_the_middle_is_a_failure(model: Path) -> None:
    # given a stand-in for a full disk
    result = run_program(model, largest_file=30_000)

    assert result.returncode == FAILED, result.stderr
    assert "out cannot be written" in result.stderr
    assert "were free when it failed; what is finished is kept, and the same command goes on there" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (model.parent / "out").exists()

    # and with room on the disk, the same command goes on
    result = run_program(model)
    assert result.returncode == 0, result.stderr
    assert "resuming after the last of 2" in result.stderr
    assert {path.name for path in model.parent.iterdir()} == {"model", "out"}


def test_a_disk_without_room_for_a_single_block_leaves_nothing_of_use_and_the_next_run_starts_anew(model: Path) -> None:
    result = run_program(model, largest_file=10_000)

    assert result.returncode == FAILED, result.stderr
    assert "out cannot be written" in result.stderr
    assert not (model.parent / "out").exists()

    result = run_program(model)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in model.parent.iterdir()} == {"model", "out"}


def test_the_program_says_it_in_one_line(model: Path) -> None:
    change_tensors(model, lambda tensors: tensors.pop(UP))

    result = run_program(model)

    assert result.returncode == REFUSED
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("load"))
    assert line.startswith(f"awq-serve: {model} lacks tensors")
    assert result.stdout == ""
