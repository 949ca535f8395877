"""The command line: refusals of one sentence, help for every setting, and lines to paste."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from server.cli import PROGRAM, StartRefused, check_draft, check_no_foreign_kernels, locate_model, name_model
from server.ready_lines import ReadyLines
from server.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The program with these arguments, and what it says on a wide terminal."""
    command = [sys.executable, "-m", "server.cli", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_a_refusal_is_one_sentence_with_a_status(tmp_path: Path) -> None:
    result = run("serve", str(tmp_path / "nothing"), "--port", "0")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"{PROGRAM}: ")
    assert str(tmp_path / "nothing") in result.stderr


def test_help_lists_every_setting_with_an_example() -> None:
    words = run("serve", "--help").stdout
    assert f"{PROGRAM} serve " in words
    for name, field in Settings.model_fields.items():
        assert name == "model" or f"--{name.replace('_', '-').removesuffix('s')}" in words
        assert field.description is not None


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match=r"config\.json"):
        locate_model(load_settings({"model": str(tmp_path)}))


def test_a_gguf_file_is_to_be_quantized_first(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(StartRefused, match="awq-serve quantize"):
        locate_model(load_settings({"model": str(tmp_path / "model.gguf")}))


def test_a_model_directory_is_served_from_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(load_settings({"model": str(tmp_path)})) == tmp_path


def test_a_model_is_called_by_the_name_that_was_typed(tmp_path: Path) -> None:
    (tmp_path / "mine-awq").mkdir()
    snapshot = tmp_path / "snapshots" / "0123abc"
    # given a hub name, then a directory, then the demo model, then a name that was set
    assert name_model(load_settings({"model": "owner/model-awq"}), snapshot) == "owner/model-awq"
    local = load_settings({"model": str(tmp_path / "mine-awq")})
    assert name_model(local, tmp_path / "mine-awq") == "mine-awq"
    assert name_model(load_settings({}), tmp_path / "demo-awq") == "demo-awq"
    named = load_settings({"model": "owner/model-awq", "served_model_name": "chosen"})
    assert name_model(named, snapshot) == "chosen"


def test_a_foreign_distribution_of_our_packages_name_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_no_foreign_kernels()
    metadata = tmp_path / "kernels-0.9.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(StartRefused, match="pip uninstall kernels"):
        check_no_foreign_kernels()


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


def test_a_draft_model_that_would_not_be_asked_or_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="would make no guesses: add --num-speculative-tokens 4"):
        check_draft(load_settings({"draft_model": str(tmp_path)}))
    asked = {"draft_model": str(tmp_path), "num_speculative_tokens": 4}
    with pytest.raises(StartRefused, match=r"has no config\.json; name the directory of a model"):
        check_draft(load_settings(asked))
    (tmp_path / "config.json").write_text("{}")
    check_draft(load_settings(asked))
