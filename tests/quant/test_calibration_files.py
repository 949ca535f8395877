"""Text and conversations read from files in the formats that the hub's data sets have."""

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from quant import calibration_files
from quant.calibration_files import read_content
from quant.calibration_mix import Column
from quant.errors import SourceError

CHAT = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_parquet(file: Path, rows: Sequence[dict[str, object]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one\n\ntwö\n", encoding="utf-8")
    assert read_content(tmp_path / "text.txt") == "one\n\ntwö\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.json.gz", "rows.jsonl.zst"])
def test_json_lines_are_read_as_they_are_packed(tmp_path: Path, name: str) -> None:
    content = json_lines({"text": "one", "url": "x"}, {"text": "two"}).encode()
    if name.endswith(".gz"):
        content = gzip.compress(content)
    if name.endswith(".zst"):
        content = pa.compress(content, codec="zstd", asbytes=True)
    (tmp_path / name).write_bytes(content)

    assert read_content(tmp_path / name) == "one\n\ntwo"


def test_the_rows_of_a_parquet_column_are_joined_by_the_separator(tmp_path: Path) -> None:
    # given rows that are lines, as WikiText's are
    rows = [{"id": 1, "text": " = Title = \n"}, {"id": 2, "text": ""}, {"id": 3, "text": " Prose .\n"}]
    file = write_parquet(tmp_path / "rows.parquet", rows)

    assert read_content(file, Column.TEXT, separator="") == " = Title = \n Prose .\n"


def test_conversations_are_kept_message_by_message(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json_lines({"messages": CHAT}, {"messages": [CHAT[0]]}))
    file = write_parquet(tmp_path / "chat.parquet", [{"prompt": "Hi", "messages": CHAT}])

    assert read_content(tmp_path / "chat.jsonl") == (CHAT, (CHAT[0],))
    assert read_content(file) == (CHAT,)


def test_text_comes_before_messages_where_rows_have_both(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "rows.parquet", [{"messages": CHAT, "text": "as text"}])

    assert read_content(file) == "as text"
    assert read_content(file, Column.MESSAGES) == (CHAT,)


@pytest.mark.parametrize("name", ["long.txt", "long.jsonl", "long.parquet"])
def test_a_long_text_is_cut_and_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # given a limit that a single text is longer than
    monkeypatch.setattr(calibration_files, "MAX_TEXT_CHARACTERS", 5)
    text, file = "abcdefgh", tmp_path / name
    if name == "long.parquet":
        write_parquet(file, [{"text": text}, {"text": text}])
    else:
        file.write_text(text if name == "long.txt" else json_lines({"text": text}, {"text": text}))

    assert read_content(file) == "abcde"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": "Hi"}, "line 1 of .* is no object with a text field, nor one with messages"),
        ({"messages": "Hi"}, "line 1 of .* is no object with messages"),
        ({"messages": []}, "line 1 of .* is no object with messages"),
        ({"messages": [{"role": "user"}]}, "line 1 of .* has a message without a role and a content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "line 1 of .* has a message without"),
    ],
)
def test_a_row_that_is_neither_text_nor_conversation_is_refused(tmp_path: Path, row: object, sentence: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json_lines(row))
    with pytest.raises(SourceError, match=sentence):
        read_content(tmp_path / "rows.jsonl")


def test_a_parquet_file_without_the_column_names_those_it_has(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "rows.parquet", [{"id": 1, "body": "x"}])
    with pytest.raises(SourceError, match=r"rows\.parquet has no column text or messages, only id, body"):
        read_content(file)


def test_a_parquet_row_without_text_is_refused_by_its_number(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "rows.parquet", [{"text": "a"}, {"text": None}])
    with pytest.raises(SourceError, match=r"row 2 of .*rows\.parquet is no object with a text field"):
        read_content(file)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "rows.jsonl.zst", "rows.jsonl", "rows.txt"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b\xff\xfe damaged")
    with pytest.raises(SourceError, match=rf"{name} cannot be read as"):
        read_content(tmp_path / name)


def test_a_gzip_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json_lines({"text": "one"}).encode())[:-10])
    with pytest.raises(SourceError, match=r"cut\.jsonl\.gz cannot be read as UTF-8 text"):
        read_content(tmp_path / "cut.jsonl.gz")


def test_without_pyarrow_parquet_is_refused_with_how_to_install_it(tmp_path: Path) -> None:
    # given a Python where pyarrow cannot be found
    program = (
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, *rest: None if name == 'pyarrow' else find(name, *rest)\n"
        "from pathlib import Path\n"
        "from quant.calibration_files import read_content\n"
        "read_content(Path(sys.argv[1]))\n"
    )
    file = write_parquet(tmp_path / "rows.parquet", [{"text": "a"}])

    result = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, timeout=120)

    assert (
        "rows.parquet is read with pyarrow, which is not installed: pip install 'awq-serve[parquet]'" in result.stderr
    )
