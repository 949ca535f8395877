"""The GPU benchmark as a whole, where there is no GPU: run as the script that it is, from a bare checkout."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from benchmarks.gpu_phases.phases import PHASES

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
# nothing of this process's ways of finding modules: the script finds its own
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One rehearsal of everything, started from another directory, and where its files are."""
    out = tmp_path_factory.mktemp("rehearsal")
    done = subprocess.run(
        # time enough for a busy machine
        [sys.executable, SCRIPT, "--rehearsal", "--minutes", "120", "--out", out],
        cwd=out,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done, out


@pytest.fixture(scope="module")
def figures(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> dict[str, Any]:
    return json.loads((rehearsal[1] / "gpu.json").read_text())


@pytest.mark.parametrize("phase", [phase.name for phase in PHASES])
def test_every_phase_has_results_and_what_it_leaves_out_has_a_reason(phase: str, figures: dict[str, Any]) -> None:
    found = figures["phases"][phase]

    assert found["state"] == "ended"
    assert found["figures"] or found["skips"]
    assert not found["failures"]
    assert all(skip["items"] and skip["why"] for skip in found["skips"])


def test_only_what_needs_a_gpu_or_a_package_is_left_out(figures: dict[str, Any]) -> None:
    reasons = {skip["why"] for phase in figures["phases"].values() for skip in phase["skips"]}

    assert reasons == {
        "the interpreter compiles nothing",
        "torch's int4 op for GPUs needs a GPU",
        "the package gemlite is not here",
    }


def test_the_kernels_pass_every_check_in_the_interpreter(figures: dict[str, Any]) -> None:
    checks = figures["phases"]["correctness"]["figures"]

    assert [check["name"] for check in checks if check["values"]["passed"] is not True] == []


def test_it_says_that_it_is_a_rehearsal_and_ends_well(
    rehearsal: tuple[subprocess.CompletedProcess[str], Path], figures: dict[str, Any]
) -> None:
    done, out = rehearsal

    assert done.returncode == 0, done.stderr
    assert figures["rehearsal"] is True
    assert figures["state"] == "complete"
    assert "a rehearsal with tiny sizes: times mean nothing" in done.stderr
    assert done.stdout == (out / "gpu.md").read_text()
    assert (out / "gpu.png").read_bytes().startswith(b"\x89PNG")
    # a rehearsal's tiles would be worse than none
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "gpu.md", "gpu.png"]


def test_what_was_measured_before_it_is_killed_is_there(tmp_path: Path) -> None:
    # given a run that is killed in its second phase
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--rehearsal", "--out", tmp_path, "--phases", "machine,correctness"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "correctness" in line)
        process.kill()

    # then its file is whole and holds the first phase
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures["phases"]["machine"]["state"] == "ended"
    assert figures["phases"]["machine"]["figures"]
    assert figures["state"] == "running"


def test_terminated_it_writes_its_page_and_says_so(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT, "--rehearsal", "--out", tmp_path, "--phases", "machine"],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "a rehearsal" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate()

    assert process.returncode == 130
    assert "interrupted" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["state"] == "interrupted"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--phases", "machine,absent"], "there is no phase 'absent'"),
        (["--minutes", "0"], "'0' is not a number of minutes above 0"),
        (["--minutes", "nan"], "'nan' is not a number of minutes above 0"),
        (["--json", "/absent/figures.json"], "is not a directory that can be written to"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        gpu.main(arguments)

    assert exit_info.value.code == 2
    assert said in capsys.readouterr().err
