"""Figures in a file: all of them or those before."""

import json
from pathlib import Path

import pytest

from benchmarks.json_file import write_json


def test_json_is_written_whole(tmp_path: Path) -> None:
    # given figures of an earlier run
    path = tmp_path / "figures.json"
    write_json(path, {"rounds": 5})
    # when writing new ones fails half-way
    with pytest.raises(TypeError):
        write_json(path, {"rounds": 6, "unwritable": object()})
    # then the earlier ones are there, and nothing else
    assert json.loads(path.read_text()) == {"rounds": 5}
    assert list(tmp_path.iterdir()) == [path]
