"""What loading takes is measured for each kind of checkpoint and kernels, in a process of its own."""

import json
from pathlib import Path

import pytest

from benchmarks.loader_memory import REST_BYTES, main
from tests.kernels.native_libraries import open_native


def test_what_loading_took_stands_beside_its_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_native()
    figures = tmp_path / "figures.json"
    # given a model of 30 MB, most of it in one file of embedding and head
    assert main(["--blocks=2", "--width=512", "--vocab=16000", "--json", str(figures)]) == 0
    dense, packed, native = json.loads(figures.read_text())["measurements"]
    vocabulary = 2 * 2 * 16000 * 512
    assert [row["kernels"] for row in (dense, packed, native)] == ["torch", "torch", "native"]
    for row in (dense, packed, native):
        assert row["bound_bytes"] > REST_BYTES
        assert row["stored_bytes"] > vocabulary
        assert row["kept_bytes"] > vocabulary / 2
        # far less than the bound: a tensor and what it becomes
        assert row["beyond_bytes"] < 2 * vocabulary
    assert dense["bound_bytes"] == pytest.approx(REST_BYTES + vocabulary, rel=0.001)
    assert "of bound" in capsys.readouterr().out
