"""The quality benchmark without its peers: arguments, figures, and a tool that runs in a process and is measured."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import measured_report, quality
from benchmarks.errors import BenchmarkError
from benchmarks.quality import Options, measure, parse_options, read_windows
from benchmarks.quality_job import Cost, Job, cut_rows, parse_peak_memory
from benchmarks.quality_report import (
    ORIGINAL,
    PLAIN_ROUNDING,
    Outcome,
    TextResult,
    measure_bits_per_weight,
    render_table,
    way_back,
)
from benchmarks.quality_tools import AUTO_ROUND, LLM_COMPRESSOR, Tool, run_tool
from quant.errors import RecipeError
from quant.evaluate import HELD_OUT_TEXT, Quality
from quant.source import open_source
from tests.tiny_models import save_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
COST = Cost(seconds=359.4, peak_memory_bytes=1_755_000_000, versions={"a-package": "1.0"})
RESULT = TextResult(
    text="test.txt",
    num_windows=24,
    window_tokens=512,
    rows=(
        Quality(ORIGINAL, 30.0, None, None),
        Quality(PLAIN_ROUNDING, 40.0, 0.25, 0.7),
        Quality("awq-serve awq", 35.0, 0.125, 0.75),
        Quality("llm-compressor AWQ", 42.0, 0.5, 0.625),
    ),
)


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    (tmp_path / "calibration.txt").write_text(TEXT)
    return tmp_path / "calibration.txt"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT.upper())
    return tmp_path / "text.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("model") / "tiny")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_info:
        quality.main(arguments)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_every_tool_runs_by_default_and_plain_rounding_first(calibration: Path, text: Path) -> None:
    options = parse_options([f"--calib={calibration}", f"--text={text}"])
    # then what the others are compared with comes first, the peers last, each with the tokens it is known for
    assert options.tools[0] == Tool(PLAIN_ROUNDING, "rtn")
    assert Tool("awq-serve awq", "awq") in options.tools
    assert options.tools[-2:] == (
        Tool("llm-compressor AWQ", "awq", LLM_COMPRESSOR, num_samples=16, sample_tokens=256),
        Tool("AutoRound", "sign-gradient", AUTO_ROUND, num_samples=64, sample_tokens=512, steps=200),
    )
    assert options.texts == (text,)


def test_a_quick_run_takes_fewer_tools_samples_and_steps(calibration: Path) -> None:
    quick = ["--ours=none", "--peers=auto-round", "--auto-round-samples=2", "--auto-round-steps=3", "--windows=1"]
    options = parse_options([f"--calib={calibration}", *quick])
    assert options.tools[1:] == (Tool("AutoRound", "sign-gradient", AUTO_ROUND, 2, 512, 3),)
    assert options.num_windows == 1


def test_without_a_text_to_measure_on_the_one_that_ships_is_taken(calibration: Path) -> None:
    assert parse_options([f"--calib={calibration}"]).texts == (HELD_OUT_TEXT,)


def test_a_text_to_calibrate_on_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert "make bench-quality CALIB=FILE" in refusal([], capsys)


def test_what_is_calibrated_on_is_not_measured_on(calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # given the same file under another name
    same = calibration.with_name("same.txt")
    same.symlink_to(calibration)
    said = refusal([f"--calib={calibration}", f"--text={same}"], capsys)
    assert "both calibrated on and measured on" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--calib=absent.txt"], "absent.txt cannot be read as UTF-8 text"),
        (["--ours=awq,magic"], "'magic' is none of gptq, awq, awq+gptq, best"),
        (["--peers=auto-awq"], "'auto-awq' is none of llm-compressor, auto-round"),
        (["--auto-round-steps=0"], "'0' is not a whole number above 0"),
        (["--json=absent/figures.json"], "absent is not a directory that can be written to"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refusal(arguments, capsys)


@pytest.mark.parametrize("content", [b"  \n", b"\xff\xfe\x00"])
def test_a_file_without_text_is_refused(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(content)
    assert f"{tmp_path / 'file'}" in refusal([f"--calib={tmp_path / 'file'}"], capsys)


def test_texts_that_are_too_short_are_refused_before_a_tool_runs(model: Path, calibration: Path, text: Path) -> None:
    tokenizer = open_source(model).tokenizer
    options = parse_options([f"--calib={calibration}", f"--text={text}", "--llm-compressor-samples=9999"])
    with pytest.raises(BenchmarkError, match=r"calibration\.txt has \d+ tokens, and llm-compressor AWQ calibrates on"):
        read_windows(tokenizer, options)
    text.write_text("a few words")
    with pytest.raises(RecipeError, match="fewer than one window of 512"):
        read_windows(tokenizer, replace(options, tools=()))


def test_calibration_rows_are_spread_over_the_text() -> None:
    assert cut_rows(range(11), num_rows=3, num_tokens=2) == [[0, 1], [3, 4], [6, 7]]
    with pytest.raises(ValueError, match="5 tokens are fewer than 3 rows of 2"):
        cut_rows(range(5), num_rows=3, num_tokens=2)


def test_peak_memory_is_read_from_the_process_status() -> None:
    assert parse_peak_memory("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n") == 2 * 1024**2


def test_the_way_back_runs_from_plain_rounding_to_the_original() -> None:
    assert way_back(40.0, plain=40.0, original=30.0) == 0.0
    assert way_back(30.0, plain=40.0, original=30.0) == 1.0
    assert way_back(32.5, plain=40.0, original=30.0) == 0.75
    # worse than plain rounding is on the other side, and where that costs nothing there is no way
    assert way_back(45.0, plain=40.0, original=30.0) == -0.5
    assert way_back(29.0, plain=30.0, original=30.0) is None


def test_the_table_shows_quality_and_cost_in_80_columns() -> None:
    # given two tools that ran
    tools = (Tool("awq-serve awq", "awq"), Tool("llm-compressor AWQ", "awq", LLM_COMPRESSOR, 16, 256))
    outcomes = [Outcome(tool, COST, calibration_tokens=4096, bits_per_weight=4.3125) for tool in tools]
    console = Console(file=StringIO(), width=80)
    # when the table is printed
    console.print(render_table(RESULT, outcomes))
    assert isinstance(console.file, StringIO)
    rows = [re.split(r"\s{2,}", line.strip()) for line in console.file.getvalue().splitlines()]
    # then each model has its row, and what was not measured or did not run is left empty
    assert ["unquantized", "30.000", "100.0 %"] in rows
    assert ["plain rounding", "40.000", "0.0 %", "0.2500", "0.7000"] in rows
    assert ["awq-serve awq", "35.000", "50.0 %", "0.1250", "0.7500", "4.31", "359", "1.75"] in rows
    assert ["llm-compressor AWQ", "42.000", "-20.0 %", "0.5000", "0.6250", "4.31", "359", "1.75"] in rows


def test_json_holds_the_figures_of_the_table() -> None:
    models = json.loads(json.dumps(RESULT.to_json()))["models"]
    assert models[2] == {
        "name": "awq-serve awq",
        "perplexity": 35.0,
        "mean_kl": 0.125,
        "top1_agreement": 0.75,
        "way_back": 0.5,
    }


def test_a_job_goes_through_its_file(tmp_path: Path) -> None:
    job = Job("model", "output", "text", "awq", num_samples=16, sample_tokens=256)
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_a_tool_runs_in_its_own_process_and_what_it_wrote_is_measured(
    model: Path, calibration: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given plain rounding of a tiny model
    monkeypatch.setattr(quality, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(measured_report, "CACHE", tmp_path / "cache")
    tool = Tool(PLAIN_ROUNDING, "rtn")
    options = Options(calibration, (text,), (tool,), num_windows=1, threads=1, json_path=None)
    job = tool.job(model, tmp_path / "cache" / "quality" / "plain-rounding", calibration)
    # when it runs, in place of what an earlier run left
    job.dense.mkdir(parents=True)
    cost = run_tool(tool, job, tmp_path / "cache", 1, lambda line: None)
    # then its process says what it took, and its files hold 4 bits a code and 20 a group of 64
    assert cost.seconds > 0
    assert cost.peak_memory_bytes > 10**8
    assert "torch" in cost.versions
    assert measure_bits_per_weight(model, job.checkpoint) == 4 + 20 / 64
    # and they are measured beside the original
    outcome = Outcome(tool, cost, calibration_tokens=0, bits_per_weight=4.3125)
    windows = read_windows(open_source(model).tokenizer, options)
    (result,) = measure(model, [outcome], windows, options)
    assert (result.text, result.num_windows, result.window_tokens) == ("text.txt", 1, 512)
    original, rounded = result.rows
    assert original == Quality(ORIGINAL, original.perplexity, None, None)
    assert rounded.name == PLAIN_ROUNDING
    assert rounded.mean_kl is not None
    assert rounded.mean_kl > 0


def test_other_modules_than_the_yardsticks_are_no_fair_result(model: Path) -> None:
    # given a checkpoint that left everything as it was
    with pytest.raises(BenchmarkError, match=r"does not quantize model\.layers\.0\..*: the linears of the blocks"):
        measure_bits_per_weight(model, model)


def test_a_tool_that_fails_is_a_sentence_that_names_its_log(model: Path, calibration: Path, tmp_path: Path) -> None:
    # given a tool of ours with a text that has too few tokens
    calibration.write_text("a few words")
    tool = Tool("awq-serve awq", "awq")
    job = tool.job(model, tmp_path / "run", calibration)
    with pytest.raises(BenchmarkError, match=r"awq-serve awq ended with exit code 2, .*run\.log"):
        run_tool(tool, job, tmp_path, 1, lambda line: None)
    # then its own words are in that log
    assert "tokens" in (tmp_path / "run.log").read_text()
