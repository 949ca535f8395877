"""A peer's environment: when it is used again, and what is said when it cannot be made."""

import sys
from pathlib import Path

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.peer_environment import PeerEnvironment, check_compilers


def test_a_command_that_fails_is_a_sentence_that_names_the_log(tmp_path: Path) -> None:
    # given a command that only fails, as one does that finds no network
    environment = PeerEnvironment(tmp_path / "peer", "fingerprint")
    with pytest.raises(BenchmarkError, match=r"could not be fetched; its words are in .*peer\.log"):
        environment.run_logged(["false"], "could not be fetched")


def test_the_words_of_a_command_are_kept_and_handed_on_line_by_line(tmp_path: Path) -> None:
    # given an environment whose commands get a variable
    environment = PeerEnvironment(tmp_path / "peer", "fingerprint", {"PEER_VARIABLE": "a value"})
    lines: list[str] = []
    # when a command prints it, and a complaint
    program = "import os, sys; print(os.environ['PEER_VARIABLE']); sys.exit(print('a complaint', file=sys.stderr))"
    environment.run_logged([sys.executable, "-c", program], "failed", lines.append)
    # then both are handed on, and stand in the log
    assert sorted(lines) == ["a complaint\n", "a value\n"]
    assert sorted(environment.log.read_text().splitlines()) == ["a complaint", "a value"]


def test_only_the_compilers_that_are_needed_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a machine that has a C++ compiler alone
    (tmp_path / "g++").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    # then what needs no other can be built, and the rest is refused by name
    check_compilers("some kernels", ("C++",))
    with pytest.raises(BenchmarkError, match="there is no C compiler to build some sources with"):
        check_compilers("some sources")
