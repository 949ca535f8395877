"""Which kernels compute the model: Triton's on a GPU, on a CPU the native ones where they can, else torch's."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.native_build import NativeUnavailable
from kernels.native_cpu import NativeCpu
from kernels.native_program import KEYS_PER_VECTOR
from server.engine.config import EngineConfig
from server.engine.errors import EngineSetupError
from server.model.native_loader import find_native_obstacle

# the values of kv_cache_dtype that the native kernels fit
NATIVE_CACHE_DTYPES = ("auto", "float16")


@dataclass(frozen=True)
class KernelChoice:
    """native: None for torch and Triton. description: for the log, with the reason where it is not the fast one."""

    native: NativeCpu | None
    description: str


def choose_kernels(config: EngineConfig, device: torch.device, directory: Path) -> KernelChoice:
    """Compile and load the native kernels where they are wanted.

    Raises EngineSetupError when cpu_kernel is native and they cannot be; CheckpointError as `load_model` does.
    """
    if device.type != "cpu":
        return KernelChoice(None, "triton")
    if config.cpu_kernel == "torch":
        return KernelChoice(None, "torch, as cpu_kernel says")
    obstacle = _find_obstacle(config, directory)
    if obstacle is None:
        try:
            native = NativeCpu.open(torch.get_num_threads(), _say)
        except NativeUnavailable as unavailable:
            obstacle = str(unavailable)
        else:
            return KernelChoice(native, f"native, {native.name}")
    if config.cpu_kernel == "native":
        raise EngineSetupError(
            f"cpu_kernel is native, but the native kernels cannot be used here: {obstacle}; use auto or torch"
        )
    return KernelChoice(None, f"torch, as the native kernels cannot be used: {obstacle}")


def _find_obstacle(config: EngineConfig, directory: Path) -> str | None:
    if config.adapters:
        return "they compute no adapters"
    if config.dtype not in ("auto", "float32"):
        return f"dtype is {config.dtype}, and they compute in float32"
    if config.kv_cache_dtype not in NATIVE_CACHE_DTYPES:
        return f"kv_cache_dtype is {config.kv_cache_dtype}, and they keep keys and values in float16"
    if config.block_size is not None and config.block_size % KEYS_PER_VECTOR:
        return f"block_size is {config.block_size}, no multiple of {KEYS_PER_VECTOR}"
    return find_native_obstacle(directory)


def _say(sentence: str) -> None:
    """Before the engine is ready it has no other way to say why it takes long."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
