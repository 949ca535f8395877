"""The benchmark of cached beginnings: it asks each prompt twice, and its figures are of what it says."""

from pathlib import Path

import pytest

import benchmarks.cached_prefix
from benchmarks.cached_prefix import run
from tests.server.engine.served import quantized_model


def test_every_case_is_timed_against_a_step_of_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # given a model of 256 tokens
    monkeypatch.setattr(benchmarks.cached_prefix, "TOKEN_IDS", range(5, 250))
    report = run(quantized_model(tmp_path), ((48, 0), (40, 3)), rounds=2, threads=1)
    assert [(timing.seen_tokens, timing.new_tokens) for timing in report.timings] == [(48, 0), (40, 3)]
    assert report.kernels.startswith("native")
    for timing in report.timings:
        assert timing.cached_steps > 0
        assert timing.fresh_steps > 0
        assert timing.step_ms > 0
