"""Presets read from a hub cache on disk and from a hub on this machine, and which file of a data set is taken."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from quant.calibration_hub import choose_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# without quant.calibration, which would load torch each time
READ_CALIBRATION = """
import sys
from quant.calibration_files import read_content
from quant.calibration_hub import data_set_file, preset_file
from quant.calibration_mix import PRESETS
from quant.errors import SourceError
name = sys.argv[1]
try:
    if name in PRESETS:
        file, preset = preset_file(name, PRESETS[name]), PRESETS[name]
        content = read_content(file, preset.column, preset.separator)
    else:
        file = data_set_file(name)
        content = read_content(file)
    print(file.name)
    print(content)
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


def read(calibration: str, settings: Mapping[str, str]) -> str:
    """The file's name and content that a program with these settings reads, or the sentence that refuses it."""
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", READ_CALIBRATION, calibration]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


def read_offline(hub: Path, preset: str) -> str:
    return read(preset, {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"})


class LocalHub(BaseHTTPRequestHandler):
    """The part of the hub's API that data sets are listed and fetched with; every data set has the same files."""

    files: Mapping[str, bytes] = {}

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test's output is its own."""

    def _answer(self, *, with_body: bool) -> None:
        place = self.path.partition("?")[0]
        if "/resolve/" in place:
            body = self.files[place.partition("/resolve/")[2].partition("/")[2]]
        elif "/tree/" in place:
            body = json.dumps(
                [{"type": "file", "path": name, "size": len(file), "oid": name} for name, file in self.files.items()]
            ).encode()
        else:
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": []}).encode()
        self.send_response(200)
        for name, value in {"ETag": '"0a"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub on this machine with these files in every data set."""
    handler = type("Hub", (LocalHub,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_preset_is_fetched_once_and_then_read_without_a_network(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": [" Prose .\n"]}), tmp_path / "rows.parquet")
    rows = (tmp_path / "rows.parquet").read_bytes()
    files = {f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet": rows for split in ("test", "train")}
    with serving(files) as address:
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        fetched = read("wikitext", settings)

    assert fetched == "train-00000-of-00001.parquet\n Prose .\n\n"
    # the hub is gone, and its other files were never here
    assert read("wikitext", settings) == fetched
    assert not list(tmp_path.glob("home/**/test-*"))


def test_the_train_file_of_any_data_set_is_fetched(tmp_path: Path) -> None:
    files = {"README.md": b"#", "test.jsonl": b'{"text": "seen"}\n', "train.jsonl": b'{"text": "text"}\n'}
    with serving(files) as address:
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        assert read("owner/name", settings) == "train.jsonl\ntext\n"


def test_wikitext_is_the_text_that_its_lines_make(tmp_path: Path) -> None:
    file = cached_file(tmp_path, "Salesforce/wikitext", "wikitext-2-raw-v1/train-00000-of-00001.parquet")
    parquet.write_table(pa.table({"text": ["", " = Title = \n", " Prose .\n"]}), file)

    assert read_offline(tmp_path, "wikitext") == ("train-00000-of-00001.parquet\n = Title = \n Prose .\n\n")


def test_c4_is_the_documents_of_its_packed_json_lines(tmp_path: Path) -> None:
    file = cached_file(tmp_path, "allenai/c4", "en/c4-train.00000-of-01024.json.gz")
    lines = "".join(json.dumps({"text": text, "timestamp": "x", "url": "y"}) + "\n" for text in ("one", "two"))
    file.write_bytes(gzip.compress(lines.encode()))

    assert read_offline(tmp_path, "c4").endswith("json.gz\none\n\ntwo\n")


def test_pileval_is_the_documents_of_its_packed_json_lines(tmp_path: Path) -> None:
    file = cached_file(tmp_path, "mit-han-lab/pile-val-backup", "val.jsonl.zst")
    lines = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in ("one", "two"))
    file.write_bytes(pa.compress(lines.encode(), codec="zstd", asbytes=True))

    assert read_offline(tmp_path, "pileval").endswith("zst\none\n\ntwo\n")


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
