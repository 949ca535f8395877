"""Calibration text: rows of the size asked for, from one source or several, and bad text refused by name."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.calibration import CalibrationTokens, calibration_tokens, read_texts
from quant.errors import RecipeError, SourceError
from quant.method import Method
from quant.progress import ignore_notice
from quant.recipe import Recipe
from quant.report import CalibrationOrigin
from quant.source import SourceModel, open_source, open_streamed
from tests.tiny_models import IM_START_ID, save_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return open_source(save_tiny_model("llama", tmp_path_factory.mktemp("model")))


def ignore_step(done: int, total: int) -> None:
    pass


def tokens_of(recipe: Recipe, source: SourceModel) -> CalibrationTokens:
    _, model = open_streamed(source.path, ignore_notice)
    return calibration_tokens(recipe, model, source.tokenizer, read_texts(recipe), ignore_step)


def recipe_for(text: Path | str, num_samples: int = 5) -> Recipe:
    """Of a method that takes the text alone."""
    return Recipe(method=Method.AWQ, calibration=str(text), num_samples=num_samples, sample_tokens=10)


def test_rows_share_no_token_of_the_text(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    # one token a byte, and every byte once: tokens can be told apart
    text.write_text("".join(chr(code) for code in range(33, 127)))
    tokens = tokens_of(recipe_for(text), source)
    assert tokens.ids.shape == (5, 10)
    assert len(tokens.ids.unique()) == 50
    # only the file's name, as the report is published
    assert tokens.origins == (CalibrationOrigin("text.txt", 1.0, 5),)


def test_a_method_that_fits_weights_reads_some_text_by_the_model_beside(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 500)
    tokens = tokens_of(replace(recipe_for(text, num_samples=8), method=Method.AWQ_GPTQ), source)
    assert [(origin.name, origin.num_rows) for origin in tokens.origins] == [
        ("text.txt", 6),
        ("text by the model itself", 2),
    ]
    assert sum(set(row) == {source.tokenizer("a")["input_ids"][0]} for row in tokens.ids.tolist()) == 6


def test_rows_are_spread_over_the_whole_text(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 500 + "b" * 500)
    rows = tokens_of(recipe_for(text), source).ids
    assert len({tuple(row) for row in rows.tolist()}) > 1


def test_of_a_long_text_each_row_has_its_own_part(source: SourceModel, tmp_path: Path) -> None:
    # given a text far longer than what the rows need
    text = tmp_path / "text.txt"
    text.write_text("".join(letter * 3000 for letter in "abcde"))
    rows = tokens_of(recipe_for(text), source).ids
    assert [source.tokenizer.decode(row) for row in rows] == [letter * 10 for letter in "abcde"]


def test_a_long_text_of_few_tokens_is_tokenized_as_a_whole(source: SourceModel, tmp_path: Path) -> None:
    # given a token that takes 17 characters, more than is reckoned with
    source = replace(source, tokenizer=copy.deepcopy(source.tokenizer))
    source.tokenizer.add_tokens(["<" + "x" * 15 + ">"])
    text = tmp_path / "text.txt"
    text.write_text(("<" + "x" * 15 + ">") * 50)
    assert tokens_of(recipe_for(text), source).ids.shape == (5, 10)


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
        "from quant.calibration import read_texts\n"
        "from quant.errors import SourceError\n"
        "from quant.recipe import Recipe\n"
        "try:\n"
        "    read_texts(Recipe(calibration='owner/name'))\n"
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
    with pytest.raises(SourceError, match=r"is no file; give a text file, a hub data set \(owner/name\), wikitext"):
        tokens_of(recipe_for(name), source)


def test_a_file_that_is_no_text_is_refused(source: SourceModel, tmp_path: Path) -> None:
    text = tmp_path / "binary.txt"
    text.write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(SourceError, match="cannot be read as UTF-8"):
        tokens_of(recipe_for(text), source)


def test_the_rows_of_a_mix_are_spread_over_all_rows(source: SourceModel, tmp_path: Path) -> None:
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 100)
    mix = f"{tmp_path / 'a.txt'}:0.75,{tmp_path / 'b.txt'}:0.25"

    tokens = tokens_of(Recipe(calibration=mix, num_samples=8, sample_tokens=10), source)

    letters = [source.tokenizer.decode(row)[0] for row in tokens.ids]
    assert sorted(letters) == ["a"] * 6 + ["b"] * 2
    assert sorted(letters[:4]) == sorted(letters[4:])
    assert tokens.origins == (CalibrationOrigin("a.txt", 0.75, 6), CalibrationOrigin("b.txt", 0.25, 2))


def test_text_of_the_model_can_be_part_of_a_mix(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    mixed = tokens_of(Recipe(calibration=f"{tmp_path / 'a.txt'}:0.5,self:0.5", num_samples=4, sample_tokens=10), source)
    alone = tokens_of(Recipe(num_samples=2, sample_tokens=10), source)

    text_id = source.tokenizer("a")["input_ids"][0]
    assert mixed.ids[0].tolist() == mixed.ids[2].tolist() == [text_id] * 10
    assert torch.equal(mixed.ids[1::2], alone.ids)
    assert mixed.origins[1] == CalibrationOrigin("text by the model itself", 0.5, 2)


def test_the_same_mix_has_the_same_digest(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 100)
    recipe = Recipe(calibration=f"{tmp_path / 'a.txt'}:0.5,self:0.5", num_samples=4, sample_tokens=10)
    assert tokens_of(recipe, source).digest == tokens_of(recipe, source).digest


def test_a_source_of_a_mix_that_is_too_short_is_named_with_its_rows(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 29)
    with pytest.raises(RecipeError, match=r"a\.txt has 29 tokens; 3 samples of 10 tokens need 30: give more text"):
        tokens_of(Recipe(calibration=f"{tmp_path / 'a.txt'}:0.5,self:0.5", num_samples=6, sample_tokens=10), source)


def conversations(file: Path, *contents: str) -> Path:
    rows = ({"messages": [{"role": "user", "content": content}]} for content in contents)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_conversations_go_through_the_chat_template(source: SourceModel, tmp_path: Path) -> None:
    file = conversations(tmp_path / "chat.jsonl", "Hi", "Ho")

    ids = tokens_of(Recipe(calibration=str(file), num_samples=1, sample_tokens=20), source).ids[0]

    assert source.tokenizer.decode(ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nHo<|im_end|>\n"
    # the markers are the special tokens, not their letters
    assert ids[0] == IM_START_ID


def test_of_many_conversations_some_are_taken_from_all(source: SourceModel, tmp_path: Path) -> None:
    # given conversations far longer together than what the rows need
    file = conversations(tmp_path / "chat.jsonl", *(letter * 100 for letter in "abcdefghij"))
    row = tokens_of(Recipe(calibration=str(file), num_samples=1, sample_tokens=20), source).ids[0]
    assert source.tokenizer.decode(row).startswith("<|im_start|>user\na")
    last = tokens_of(Recipe(calibration=str(file), num_samples=4, sample_tokens=5), source).ids[-1]
    assert set(source.tokenizer.decode(last)) & set("ghij")


def test_conversations_for_a_model_without_a_template_are_refused(tmp_path: Path) -> None:
    base = open_source(save_tiny_model("llama", tmp_path / "model"))
    base.tokenizer.chat_template = None
    file = conversations(tmp_path / "chat.jsonl", "Hi" * 100)
    with pytest.raises(SourceError, match=r"chat\.jsonl holds conversations, and this model has no chat template"):
        tokens_of(Recipe(calibration=str(file), num_samples=1, sample_tokens=10), base)


def test_a_conversation_that_the_template_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    strict = open_source(save_tiny_model("llama", tmp_path / "model"))
    strict.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = conversations(tmp_path / "chat.jsonl", "Hi" * 100)
    with pytest.raises(SourceError, match=r"a conversation of chat\.jsonl \(roles user\): roles must alternate"):
        tokens_of(Recipe(calibration=str(file), num_samples=1, sample_tokens=10), strict)


def test_a_mix_without_shares_is_told_how_one_is_written(source: SourceModel) -> None:
    with pytest.raises(SourceError, match=r"wikitext,self is no file; .* like wikitext:0\.5,self:0\.5"):
        tokens_of(recipe_for("wikitext,self"), source)
