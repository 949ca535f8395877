"""What each side of the engine loads: the API's process no torch, a bare CUDA machine no transport."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("server.engine.client", ("torch", "numpy", "transformers", "fastapi", "pydantic")),
        ("server.engine.in_process_client", ("zmq", "msgspec", "transformers", "fastapi", "pydantic")),
    ],
)
def test_only_what_the_process_needs_is_imported(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
