"""The command line as a program: exit codes, JSON lines, and what is left after it is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from click.testing import Result
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from quant.checkpoint.reader import CheckpointReader
from quant.cli import app
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--calib-samples", "4", "--calib-seqlen", "32")


def start(arguments: Sequence[str], settings: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "quant", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(settings or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # with room for a calibration row that takes minutes to write
    overrides = {"max_position_embeddings": 1_000_000}
    return save_tiny_model("llama", tmp_path_factory.mktemp("source") / "model", config_overrides=overrides)


def test_json_progress_is_one_event_a_line_and_ends_with_the_report(model: Path, tmp_path: Path) -> None:
    process = start(["quantize", str(model), str(tmp_path / "out"), *SMALL, "--progress-format", "json", "--verbose"])
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    events = [json.loads(line) for line in output.splitlines()]
    blocks = [event for event in events if event["event"] == "block"]
    *progress, done = (event for event in events if event["event"] != "block")
    assert all(set(event) == {"event", "phase", "done", "total", "seconds_left"} for event in progress)
    assert list(dict.fromkeys(event["phase"] for event in progress)) == ["load", "calibrate", "quantize", "evaluate"]
    assert done["event"] == "done"
    assert done["output"] == str(tmp_path / "out")
    assert done["report"]["recipe"]["num_samples"] == 4
    CheckpointReader.open(tmp_path / "out")
    # each block that was finished, with the numbers that its linears have in the report
    assert [(block["block"], block["kept"]) for block in blocks] == [
        (block["name"], block["kept"]) for block in done["report"]["blocks"]
    ]
    assert [layer for block in blocks for layer in block["layers"]] == [
        {name: layer[name] for name in ("name", "formula", "plain", "chosen")} for layer in done["report"]["layers"]
    ]


def test_people_are_told_of_an_architecture_without_a_row(tmp_path: Path) -> None:
    source = save_tiny_model("stablelm", tmp_path / "model")
    result = invoke("quantize", str(source), str(tmp_path / "out"), *SMALL, "--no-eval")
    assert result.exit_code == 0, result.output
    assert "stablelm has no row in the table of architectures" in result.stdout


def test_people_get_the_tables_on_stdout_and_each_linear_on_stderr_if_they_want(model: Path, tmp_path: Path) -> None:
    result = invoke("quantize", str(model), str(tmp_path / "out"), *SMALL, "--no-eval", "-v")
    assert result.exit_code == 0, result.output
    told = [line.split() for line in result.stderr.splitlines() if " -> " in line]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    per_layer = [
        [layer["name"], *layer["formula"].split(), f"{layer['plain']:.6f}", "->", f"{layer['chosen']:.6f}"]
        for layer in report["layers"]
    ]
    assert [line[:-1] for line in told if "block" not in line] == per_layer
    assert {line[-1] for line in told} <= {"searched", "plain"}
    assert [line[0] for line in told if "block" in line] == [block["name"] for block in report["blocks"]]
    assert "mlp.down_proj" in result.stdout
    assert "4.312" in result.stdout
    assert "perplexity" not in result.stdout


def test_bits_groups_and_format_are_what_was_asked_for(model: Path, tmp_path: Path) -> None:
    options = ("--bits", "3", "--group-size", "row", "--format", "compressed-tensors", "--method", "rtn", "--no-eval")
    result = invoke("quantize", str(model), str(tmp_path / "out"), *options)
    assert result.exit_code == 0, result.output
    assert "3 bits, one scale a row" in result.stdout
    reader = CheckpointReader.open(tmp_path / "out")
    specs = [reader.packed_spec(name) for name in reader.quantized_module_names]
    assert {(spec.bits, spec.is_whole_row) for spec in specs} == {(3, True)}


def test_a_target_and_a_head_are_what_was_asked_for(model: Path, tmp_path: Path) -> None:
    options = ("--target-bpw", "5", "--lm-head", "8", "--no-eval")
    result = invoke("quantize", str(model), str(tmp_path / "out"), *SMALL, *options)
    assert result.exit_code == 0, result.output
    assert "lm_head" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["bits_per_weight"] <= 5
    assert len(report["mixture"]) > 1
    assert CheckpointReader.open(tmp_path / "out").packed_spec("lm_head").bits == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--group-size", "128"), "group size 128 does not divide the 64 in features of"),
        (("--group-size", "big"), "group size is 'big'; supported: auto, 128, 64, 32, row"),
        (("--bits", "5"), "bits is 5; supported: 3, 4, 8"),
        (
            ("--method", "rtn", "--calib", "wikitext"),
            "the method rtn reads no calibration text; leave out --calib, or choose another method",
        ),
        (("--format", "gptq"), "format is 'gptq'; supported: auto, awq, compressed-tensors"),
        (
            ("--bits", "8", "--format", "awq"),
            "bits is 8, and the AWQ gemm format holds 4 bits only; use --format compressed-tensors",
        ),
    ],
)
def test_bad_options_end_with_code_2_and_one_sentence(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = invoke("quantize", str(model), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert not list(tmp_path.iterdir())


def test_bad_input_is_a_failed_event_for_programs(tmp_path: Path) -> None:
    result = invoke("quantize", str(tmp_path / "nothing"), str(tmp_path / "out"), "--progress-format", "json")
    assert result.exit_code == 2
    event = json.loads(result.stdout.splitlines()[-1])
    assert event["event"] == "failed"
    assert "nothing" in event["message"]


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGINT, "interrupted; nothing was written"),
        (signal.SIGTERM, "terminated"),
    ],
)
def test_a_run_that_is_stopped_before_anything_is_finished_removes_what_it_wrote(
    number: signal.Signals, sentence: str, model: Path, tmp_path: Path
) -> None:
    process = _start_and_wait_for_writing(model, tmp_path)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert json.loads(output.splitlines()[-1]) == {"event": "failed", "message": sentence}
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_nothing_that_looks_finished(model: Path, tmp_path: Path) -> None:
    process = _start_and_wait_for_writing(model, tmp_path)
    process.kill()
    process.communicate(timeout=120)
    assert not (tmp_path / "out").exists()
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())


def _start_and_wait_for_writing(model: Path, directory: Path) -> subprocess.Popen[str]:
    """A run in the middle of its work: its hidden folder is there. It would go on for minutes."""
    endless = ("--calib-samples", "4", "--calib-seqlen", "100000", "--progress-format", "json")
    process = start(["quantize", str(model), str(directory / "out"), *endless])
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["phase"] == "calibrate":
            return process
    raise AssertionError(f"the run ended early: {process.communicate()[1]}")


def test_a_model_of_the_hub_is_recorded_by_its_name_and_found_again(tmp_path: Path) -> None:
    # given a model in the hub's cache, as after it was fetched, with a card that states its licence
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--owner--tiny"
    snapshot = save_tiny_model("llama", cached / "snapshots" / commit)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = tmp_path / "tiny-awq"

    # when it is quantized by its name, and the result is compared with what the report names
    quantized = start(["quantize", "owner/tiny", str(out), "--method", "rtn"], offline)
    errors = quantized.communicate(timeout=240)[1]
    measured = start(["eval", str(out), "--windows", "1"], offline)
    table, eval_errors = measured.communicate(timeout=240)

    assert quantized.returncode == 0, errors
    card = ModelCard.load(out / "README.md").data
    assert (card.base_model, card.license) == ("owner/tiny", "mit")
    assert json.loads((out / "report.json").read_text())["source"] == "owner/tiny"
    assert str(tmp_path) not in (out / "README.md").read_text() + (out / "report.json").read_text()
    assert measured.returncode == 0, eval_errors
    assert "plain rounding" in table
