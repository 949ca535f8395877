"""Figures as a file that is whole at every moment. Standard library alone: a bare machine keeps figures too."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_json(path: Path, figures: Mapping[str, object]) -> None:
    """All of it or nothing: whoever reads the file never finds half of one, nor loses the one before."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w") as file:
            file.write(json.dumps(figures, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
