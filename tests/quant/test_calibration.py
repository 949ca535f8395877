"""Calibration text: rows of the size asked for, and bad text refused by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.calibration import CalibrationTokens, calibration_tokens, read_text
from quant.errors import RecipeError, SourceError
from quant.recipe import Recipe
from quant.source import SourceModel, open_source
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(save_tiny_model("llama", tmp_path_factory.mktemp("model")))


def ignore_step(done: int, total: int) -> None:
    pass


def tokens_of(recipe: Recipe, source: SourceModel) -> CalibrationTokens:
    return calibration_tokens(recipe, source, read_text(recipe), ignore_step)


def recipe_for(text: Path | str, num_samples: int = 5) -> Recipe:
    return Recipe(calibration=str(text), num_samples=num_samples, sample_tokens=10)


def test_rows_share_no_token_of_the_text(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    # one token a byte, and every byte once: tokens can be told apart
    text.write_text("".join(chr(code) for code in range(33, 127)))
    tokens = tokens_of(recipe_for(text), source)
    assert tokens.ids.shape == (5, 10)
    assert len(tokens.ids.unique()) == 50
    assert tokens.origin == str(text)


def test_rows_are_spread_over_the_whole_text(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 500 + "b" * 500)
    rows = tokens_of(recipe_for(text), source).ids
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_the_same_text_has_the_same_digest(source: SourceModel, tmp_path: Path) -> None:
    digests = []
    for name, content in (("a", "x" * 60), ("b", "x" * 60), ("c", "y" * 60)):
        (tmp_path / name).write_text(content)
        digests.append(tokens_of(recipe_for(tmp_path / name), source).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_text_that_is_too_short_says_how_many_tokens_are_needed(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 49)
    with pytest.raises(RecipeError, match=r"short\.txt has 49 tokens; 5 .* need 50"):
        tokens_of(recipe_for(text), source)


def test_json_lines_give_their_text_fields(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": letter * 30}) + "\n" for letter in "abc"))
    rows = tokens_of(recipe_for(text), source).ids
    assert source.tokenizer.decode(rows[0]) == "a" * 10


def test_json_lines_without_text_are_refused_with_the_line(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc"}\n{"prompt": "abc"}\n{"text": "abc"}\n')
    with pytest.raises(SourceError, match=r"line 2 of .*text\.jsonl"):
        tokens_of(recipe_for(text), source)


def test_the_last_json_line_counts_too(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    # 50 tokens: 21 and the three bytes of a line separator, which ends no line here, two that join, and 24
    text.write_text('{"text": "' + "a" * 21 + "\u2028" + '"}\n\n{"text": "' + "b" * 24 + '"}', encoding="utf-8")
    assert tokens_of(recipe_for(text), source).ids[-1].tolist()[-1] == source.tokenizer("b")["input_ids"][0]


@pytest.mark.parametrize("line", ['{"text": null}', "[1]", '"abc"', '{"text": "abc"'])
def test_a_json_line_that_is_no_document_is_refused(source: SourceModel, tmp_path: Path, line: str) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc"}\n' + line)
    with pytest.raises(SourceError, match=r"line 2 of .*text\.jsonl"):
        tokens_of(recipe_for(text), source)


def test_a_hub_that_cannot_be_reached_is_told_in_a_sentence(source: SourceModel) -> None:
    program = (
        "from quant.calibration import read_text\n"
        "from quant.errors import SourceError\n"
        "from quant.recipe import Recipe\n"
        "try:\n"
        "    read_text(Recipe(calibration='owner/name'))\n"
        "except SourceError as error:\n"
        "    print(error)\n"
    )
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **offline, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'owner/name' is neither a file here nor a data set that the hub gives" in result.stdout


@pytest.mark.parametrize("name", ["/no/such/file.txt", "./missing.txt", "missing.txt", "folder/missing.txt", "typo"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source: SourceModel, name: str) -> None:
    with pytest.raises(SourceError, match=r"is no file; give a text file, a hub data set \(owner/name\), or self"):
        tokens_of(recipe_for(name), source)


def test_a_file_that_is_no_text_is_refused(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "binary.txt"
    text.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(SourceError, match="cannot be read as UTF-8"):
        tokens_of(recipe_for(text), source)
