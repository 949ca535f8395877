"""The set-up script says in one sentence what stops it, before it changes anything."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "create_environment.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("create_environment", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["create_environment"] = module
    spec.loader.exec_module(module)
    return module


def test_a_full_disk_is_told_with_the_numbers(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**10, 9 * 10**9, 10**9))
    environment = script.Environment(tmp_path / ".venv", "cpu", dev=False)
    with pytest.raises(script.SetupError, match=r"1\.0 GB free.*needs about 4 GB"):
        script.check_machine(environment)


def test_an_old_python_is_told_what_is_needed(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    with pytest.raises(script.SetupError, match=r"needs Python 3\.11"):
        script.check_machine(script.Environment(tmp_path / ".venv", "cpu", dev=False))


def test_pip_without_network_ends_in_one_sentence(tmp_path: Path) -> None:
    # given an index that nothing answers for
    blocked = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--directory", str(tmp_path / ".venv")],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **blocked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: pip could not install it")


def test_an_environment_with_the_development_tools_serves_as_one_without(script: ModuleType, tmp_path: Path) -> None:
    with_tools = script.Environment(tmp_path, "cpu", dev=True)
    with_tools.python.parent.mkdir(parents=True)
    with_tools.python.touch()
    for stamp in with_tools.stamps:
        stamp.write_text(with_tools.fingerprint())
    assert script.Environment(tmp_path, "cpu", dev=False).is_ready()


@pytest.mark.parametrize(("device", "pinned"), [("cpu", True), ("cuda", False)])
def test_everything_is_pinned_but_what_a_cuda_torch_brings(
    script: ModuleType, tmp_path: Path, device: str, pinned: bool
) -> None:
    text = script.write_constraints(script.Environment(tmp_path, device, dev=True)).read_text()
    assert "transformers==" in text
    assert ("triton==" in text) is pinned


def test_an_unfinished_environment_is_made_again(script: ModuleType, tmp_path: Path) -> None:
    environment = script.Environment(tmp_path, "cpu", dev=True)
    environment.python.parent.mkdir(parents=True)
    environment.python.touch()
    assert not environment.is_ready()
