"""The command eval: which of its two kinds of model it was given, its files, and what it refuses before it works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from quant.cli import app
from quant.pipeline import quantize
from quant.recipe import Method, Recipe
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--windows", "2", "--window-tokens", "64", "--calib-samples", "4", "--calib-seqlen", "32")
# as on a machine where the extra is not installed
WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = None
from quant.cli import app
app()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def checkpoint(model: Path) -> Path:
    quantize(Recipe(method=Method.RTN, num_windows=0), model, model.parent / "checkpoint")
    return model.parent / "checkpoint"


def invoke(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", *arguments])


def rows(result: Result) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    return {name: rest for name, *rest in cells}


def test_an_unquantized_model_is_tried_with_the_methods_and_the_files_are_written(model: Path, tmp_path: Path) -> None:
    figures, picture = tmp_path / "figures.json", tmp_path / "methods.png"

    result = invoke(
        str(model), *SMALL, "--methods", "fp,rtn,awq", "--json", str(figures), "--plot", str(picture), "--bits", "3"
    )

    assert result.exit_code == 0, result.output
    assert list(rows(result)) == ["fp", "rtn", "awq"]
    assert rows(result)["rtn"][-2].startswith("3.")
    saved = json.loads(figures.read_text())
    assert [row["quality"]["name"] for row in saved["results"]] == ["rtn", "awq"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"figures.json", "methods.png"}


def test_without_a_list_every_method_is_tried(model: Path) -> None:
    result = invoke(str(model), *SMALL)

    assert result.exit_code == 0, result.output
    assert set(rows(result)) == {"fp", *(method.value for method in Method)}


def test_a_checkpoint_is_compared_with_its_original(checkpoint: Path, tmp_path: Path) -> None:
    result = invoke(
        str(checkpoint), "--windows", "2", "--window-tokens", "64", "--json", str(tmp_path / "figures.json")
    )

    assert result.exit_code == 0, result.output
    assert list(rows(result)) == ["original", "plain rounding", "checkpoint"]
    saved = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"] for row in saved["rows"]] == ["original", "plain rounding", "checkpoint"]


def test_options_of_the_other_kind_of_model_are_refused_by_name(model: Path, checkpoint: Path) -> None:
    for_methods = invoke(str(checkpoint), "--methods", "fp,rtn", "--calib-samples", "4")
    for_checkpoints = invoke(str(model), "--against", str(model))

    assert for_methods.exit_code == for_checkpoints.exit_code == 2
    assert "is quantized: only an unquantized model can be tried with other methods; leave out --methods, " in (
        for_methods.stderr
    )
    assert "--calib-samples" in for_methods.stderr
    assert "is not quantized, and its own original; leave out --against" in for_checkpoints.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--methods", "magic"), "'magic' is no method; choose from fp, "),
        (("--bits", "5"), "bits is 5; supported: 3, 4, 8"),
        (("--group-size", "big"), "group size is 'big'; supported: auto, 128, 64, 32, row"),
        (("--group-size", "128"), "group size 128 does not divide the 64 in features of"),
        (("--device", "tpu"), "'tpu' is not one of"),
        (("--plot", "absent/methods.png"), "absent/methods.png cannot be written: absent is no directory"),
        (("--json", "."), ". is a directory; give the name of a file"),
        (("--text", "absent.txt"), "absent.txt cannot be read as UTF-8 text"),
        (("--calib", "absent.txt"), "absent.txt"),
        (("--methods", "fp,rtn", "--calib", "wikitext"), "the method rtn reads no calibration text; leave out --calib"),
    ],
)
def test_bad_options_end_with_code_2_and_one_sentence(model: Path, arguments: tuple[str, ...], sentence: str) -> None:
    result = invoke(str(model), *arguments)

    assert result.exit_code == 2
    assert sentence in result.stderr


def test_drawing_without_matplotlib_is_refused_before_the_work(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "methods.png"

    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_MATPLOTLIB, "eval", str(model), *SMALL, "--plot", str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ended.returncode == 2, ended.stderr
    assert "drawing needs matplotlib, which is not installed: pip install 'awq-serve[plot]'" in ended.stderr
    assert not picture.exists()
