"""Presets read from a hub cache on disk, and which file of a data set is taken; nothing is fetched."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from quant.calibration_hub import choose_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
READ_PRESET = """
import sys
from quant.calibration import read_texts
from quant.errors import SourceError
from quant.recipe import Recipe
try:
    (text,) = read_texts(Recipe(calibration=sys.argv[1]))
    print(text.origin.name)
    print(text.content)
except SourceError as error:
    print(error)
"""


def cached_file(hub: Path, repository: str, name: str) -> Path:
    """A place in the hub's cache, as after the file was fetched."""
    folder = hub / f"datasets--{repository.replace('/', '--')}"
    file = folder / "snapshots" / COMMIT / name
    file.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return file


def read_offline(hub: Path, preset: str) -> str:
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(hub),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-c", READ_PRESET, preset]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


def test_wikitext_is_the_text_that_its_lines_make(tmp_path: Path) -> None:
    file = cached_file(tmp_path, "Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet")
    parquet.write_table(pa.table({"text": ["", " = Title = \n", " Prose .\n"]}), file)

    assert read_offline(tmp_path, "wikitext") == (
        "wikitext (Salesforce/wikitext, train-00000-of-00001.parquet)\n = Title = \n Prose .\n\n"
    )


def test_c4_is_the_documents_of_its_packed_json_lines(tmp_path: Path) -> None:
    file = cached_file(tmp_path, "allenai/c4", "en/c4-train.00000-of-01024.json.gz")
    lines = "".join(json.dumps({"text": text, "timestamp": "x", "url": "y"}) + "\n" for text in ("one", "two"))
    file.write_bytes(gzip.compress(lines.encode()))

    assert read_offline(tmp_path, "c4").endswith("json.gz)\none\n\ntwo\n")


def test_pileval_is_the_documents_of_its_packed_json_lines(tmp_path: Path) -> None:
    file = cached_file(tmp_path, "mit-han-lab/pile-val-backup", "val.jsonl.zst")
    lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in ("one", "two"))
    file.write_bytes(pa.compress(lines.encode(), codec="zstd", asbytes=True))

    assert read_offline(tmp_path, "pileval").endswith("zst)\none\n\ntwo\n")


def test_ultrachat_is_conversations(tmp_path: Path) -> None:
    name = "data/train_sft-00000-of-00003-a3ecf92756993583.parquet"
    file = cached_file(tmp_path, "HuggingFaceH4/ultrachat_200k", name)
    messages = [{"content": "Hi", "role": "user"}, {"content": "Hello", "role": "assistant"}]
    rows = [{"prompt": "Hi", "prompt_id": "1", "messages": messages}]
    parquet.write_table(pa.Table.from_pylist(rows), file)

    assert "({'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello'})" in read_offline(
        tmp_path, "ultrachat"
    )


def test_a_preset_that_was_never_fetched_is_one_sentence_without_a_network(tmp_path: Path) -> None:
    sentence = read_offline(tmp_path, "wikitext")
    assert "calibration preset wikitext (Salesforce/wikitext) cannot be fetched from the hub" in sentence
    assert "use self, which needs none" in sentence


def test_a_preset_whose_file_was_never_fetched_is_named(tmp_path: Path) -> None:
    # given a cache with another file of the same data set
    cached_file(tmp_path, "Salesforce/wikitext", "wikitext-103-raw-v1/other.parquet").touch()
    assert "Salesforce/wikitext has no file wikitext-2-raw-v1/train-*.parquet" in read_offline(tmp_path, "wikitext")


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["README.md", "data/test.parquet", "data/train-00001.parquet", "data/train-00000.parquet"], 3),
        (["LICENSE.txt", "requirements.txt", "corpus.txt"], 2),
        (["dataset_infos.json", "rows.jsonl"], 1),
        (["train/a.jsonl.gz", "validation/a.jsonl.gz"], 0),
        (["train.json.zst", "train.arrow"], 0),
    ],
)
def test_the_first_file_of_the_train_split_is_read(files: list[str], chosen: int) -> None:
    assert choose_file(files) == files[chosen]


def test_a_data_set_without_text_has_no_file_to_read() -> None:
    assert choose_file([".gitattributes", "README.md", "LICENSE.txt", "train.arrow"]) is None
