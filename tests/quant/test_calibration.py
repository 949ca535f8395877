"""Calibration text: rows of the size asked for, and bad text refused by name."""

import json
from pathlib import Path

import pytest

from quant.calibration import calibration_tokens
from quant.errors import RecipeError, SourceError
from quant.recipe import Recipe
from quant.source import SourceModel, open_source
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(save_tiny_model("llama", tmp_path_factory.mktemp("model")))


def ignore_step(done: int, total: int) -> None:
    pass


def recipe_for(text: Path | str, num_samples: int = 5) -> Recipe:
    return Recipe(calibration=str(text), num_samples=num_samples, sample_tokens=10)


def test_rows_share_no_token_of_the_text(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    # one token a byte, and every byte once: tokens can be told apart
    text.write_text("".join(chr(code) for code in range(33, 127)))
    tokens = calibration_tokens(recipe_for(text), source, ignore_step)
    assert tokens.ids.shape == (5, 10)
    assert len(tokens.ids.unique()) == 50
    assert tokens.origin == str(text)


def test_rows_are_spread_over_the_whole_text(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 500 + "b" * 500)
    rows = calibration_tokens(recipe_for(text), source, ignore_step).ids
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_the_same_text_has_the_same_digest(source: SourceModel, tmp_path: Path) -> None:
    digests = []
    for name, content in (("a", "x" * 60), ("b", "x" * 60), ("c", "y" * 60)):
        (tmp_path / name).write_text(content)
        digests.append(calibration_tokens(recipe_for(tmp_path / name), source, ignore_step).digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_text_that_is_too_short_says_how_many_tokens_are_needed(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * 49)
    with pytest.raises(RecipeError, match=r"short\.txt has 49 tokens; 5 .* need 50"):
        calibration_tokens(recipe_for(text), source, ignore_step)


def test_json_lines_give_their_text_fields(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": letter * 30}) + "\n" for letter in "abc"))
    rows = calibration_tokens(recipe_for(text), source, ignore_step).ids
    assert source.tokenizer.decode(rows[0]) == "a" * 10


def test_json_lines_without_text_are_refused_with_the_line(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc"}\n{"prompt": "abc"}\n{"text": "abc"}\n')
    with pytest.raises(SourceError, match=r"line 2 of .*text\.jsonl"):
        calibration_tokens(recipe_for(text), source, ignore_step)


@pytest.mark.parametrize("name", ["/no/such/file.txt", "./missing.txt"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source: SourceModel, name: str) -> None:
    with pytest.raises(SourceError, match=r"is no file; give a text file, a hub data set, or self"):
        calibration_tokens(recipe_for(name), source, ignore_step)


def test_a_file_that_is_no_text_is_refused(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "binary.txt"
    text.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(SourceError, match="cannot be read as UTF-8"):
        calibration_tokens(recipe_for(text), source, ignore_step)
