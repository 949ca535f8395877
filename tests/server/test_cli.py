"""The command line: refusals of one sentence, help for every setting, and lines to paste."""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from server.cli import PROGRAM
from server.ready_lines import ReadyLines
from server.settings import Settings
from tests.tiny_models import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The program with these arguments, and what it says on a wide terminal."""
    path = os.pathsep.join(str(part) for part in (ROOT, python_path) if part is not None)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "COLUMNS": "200",
        "PYTHONPATH": path,
    }
    command = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def refusal_of(*arguments: str, python_path: Path | None = None) -> str:
    result = run(*arguments, python_path=python_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(f"{PROGRAM}: ")
    return result.stderr


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refusal_of("serve", str(tmp_path / "nothing"), "--port", "0")


def test_a_directory_without_a_model_is_named(tmp_path: Path) -> None:
    assert "config.json" in refusal_of("serve", str(tmp_path), "--port", "0")


def test_a_gguf_file_is_to_be_quantized_first(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "awq-serve quantize" in refusal_of("serve", str(tmp_path / "model.gguf"), "--port", "0")


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    (save_tiny_model("llama", tmp_path) / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal_of("serve", str(tmp_path), "--port", "0")


def test_a_port_that_is_taken_is_told_before_the_model_loads(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in refusal_of("serve", str(tmp_path), "--port", port)


def test_a_wrong_setting_is_told() -> None:
    assert "max-num-seqs" in refusal_of("serve", "--max-num-seqs", "none")


def test_a_foreign_distribution_of_our_packages_name_is_told(tmp_path: Path) -> None:
    metadata = tmp_path / "kernels-0.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    assert "pip uninstall kernels" in refusal_of("serve", "--port", "0", python_path=tmp_path)


def test_a_data_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    model = save_tiny_model("llama", tmp_path / "tiny")
    (tmp_path / "file").write_text("no directory")
    assert "file" in refusal_of("serve", str(model), "--port", "0", "--data-dir", str(tmp_path / "file" / "data"))


def test_help_lists_every_setting_with_an_example() -> None:
    words = run("serve", "--help").stdout
    assert f"{PROGRAM} serve " in words
    for name, field in Settings.model_fields.items():
        assert name == "model" or f"--{name.replace('_', '-').removesuffix('s')}" in words
        assert field.description is not None


LINES = ReadyLines(
    host="127.0.0.1", port=8000, model_name="it's", has_key=False, has_chat=True, quantizable="owner/name"
)


def test_the_lines_can_be_pasted() -> None:
    introduction, *commands = LINES.render()
    assert "http://127.0.0.1:8000" in introduction
    words = [shlex.split(command) for command in commands]
    paths = ["/v1/completions", "/v1/chat/completions", "/quantize"]
    assert [command[:2] for command in words] == [["curl", f"http://127.0.0.1:8000{path}"] for path in paths]
    for command in words:
        assert isinstance(orjson.loads(command[-1]), dict)


@pytest.mark.parametrize(
    ("host", "url"), [("0.0.0.0", "http://127.0.0.1:1"), ("::", "http://[::1]:1"), ("::1", "http://[::1]:1")]
)
def test_the_lines_name_an_address_that_can_be_reached(host: str, url: str) -> None:
    lines = ReadyLines(host=host, port=1, model_name="m", has_key=True, has_chat=False, quantizable="q").render()
    assert all(url in line for line in lines)
    # the key itself is never on the screen
    assert all("$AWQ_SERVE_API_KEY" in line for line in lines[1:])
    assert len(lines) == 3
