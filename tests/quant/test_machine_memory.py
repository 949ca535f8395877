"""What memory is free, as Linux and a container's limit say."""

from pathlib import Path

import pytest

from quant.machine_memory import available_bytes

MEMINFO = "MemTotal:       16000 kB\nMemFree:         2000 kB\nMemAvailable:    8000 kB\nHugePages_Total:  0\n"


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    file = tmp_path / "meminfo"
    file.write_text(MEMINFO)
    return file


def test_what_could_be_freed_counts(meminfo: Path, tmp_path: Path) -> None:
    assert available_bytes(meminfo, tmp_path) == 8000 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        ("max", "5", 8000 * 1024),
        ("3000000", "1000000", 2_000_000),
        ("1000000", "3000000", 0),
        ("99000000", "1", 8000 * 1024),
    ],
)
def test_a_container_has_what_its_limit_leaves(
    limit: str, used: str, expected: int, meminfo: Path, tmp_path: Path
) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert available_bytes(meminfo, tmp_path) == expected


@pytest.mark.parametrize("content", ["", "MemAvailable: many kB\n", "nonsense"])
def test_on_another_system_nobody_knows(content: str, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(content)
    assert available_bytes(tmp_path / "meminfo", tmp_path) is None
    assert available_bytes(tmp_path / "missing", tmp_path) is None
