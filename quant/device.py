"""The device that blocks are run, searched and rounded on: the GPU that torch sees, or the CPU.

Hidden states, what is kept of them, and all that is written stay on the host: a GPU holds one block at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from kernels.layout import PackedWeight
from quant.device_name import DeviceName
from quant.errors import DeviceFull, RecipeError

HOST = torch.device("cpu")
CUDA = "cuda"
# what the context and the libraries of a GPU take for themselves, and what its memory is split up by
GPU_RESERVE_BYTES = 2**30
# what CUDA, cuBLAS and cuSOLVER say where they have no memory, in errors of no class of their own
OUT_OF_MEMORY_SIGNS = ("out of memory", "ALLOC_FAILED", "CUSOLVER_STATUS_INTERNAL_ERROR")


@dataclass(frozen=True)
class Gpu:
    """A GPU: how torch and how people call it, and how much of its memory nobody uses."""

    device: torch.device
    name: str
    free_bytes: int


@dataclass(frozen=True)
class ChosenDevice:
    """name: what reports call it, and runs are told apart by. notice: what the user should hear; None where nothing."""

    device: torch.device
    name: str
    notice: str | None


def find_gpu() -> Gpu | None:
    """The GPU that torch uses unless told otherwise; None where it sees none.

    One that others have filled, or taken for themselves, has nothing free.
    """
    if not torch.cuda.is_available():
        return None
    device = torch.device(CUDA, 0)
    try:
        check_usable(device)
        return Gpu(device, torch.cuda.get_device_name(device), free_bytes(device))
    except RuntimeError:
        # there is no room even for what a process needs to ask, or nothing that it could run
        return Gpu(device, "the GPU", 0)


def check_usable(device: torch.device) -> None:
    """Raises RuntimeError for a GPU that torch sees and cannot use: it is full, or there are no kernels for it."""
    ones = torch.ones(2, 2, device=device)
    torch.matmul(ones, ones).tolist()


def free_bytes(device: torch.device) -> int:
    """What a GPU has left for this and other programs."""
    free: int = torch.get_device_module(device).mem_get_info(device)[0]
    return free


def peak_bytes(device: torch.device) -> int | None:
    """The most that this program's tensors have taken on a GPU at once; None on the host."""
    if device == HOST:
        return None
    peak: int = torch.get_device_module(device).max_memory_allocated(device)
    return peak


def release_cache(device: torch.device) -> None:
    """Give back to other programs what torch keeps of a GPU's memory for later tensors."""
    if device != HOST:
        torch.get_device_module(device).empty_cache()


def asked_gpu(asked: DeviceName, find: Callable[[], Gpu | None]) -> Gpu | None:
    """The GPU, if it may be used. Raises RecipeError where it is asked for and there is none."""
    if asked == DeviceName.CPU:
        return None
    gpu = find()
    if gpu is None and asked == DeviceName.CUDA:
        raise RecipeError(
            "the device is cuda, and torch sees no GPU: there is none, or no driver for it, or this torch was built "
            "without CUDA; use --device cpu, or auto",
            field="device",
        )
    if gpu is not None and asked == DeviceName.CUDA and not gpu.free_bytes:
        raise RecipeError(
            f"the device is cuda, and {gpu.name} cannot be used: other programs have filled it or taken it for "
            "themselves, or this torch has no kernels for it; use --device cpu, or auto",
            field="device",
        )
    return gpu


def choose_device(asked: DeviceName, gpu: Gpu | None, needed_bytes: int) -> ChosenDevice:
    """The GPU, if there is one, and unless `auto` leaves the choice and less than needed_bytes of it is free."""
    if gpu is None:
        return ChosenDevice(HOST, HOST.type, None)
    free = f"{gpu.free_bytes / 1e9:.1f} GB"
    if asked == DeviceName.AUTO and gpu.free_bytes < needed_bytes:
        return ChosenDevice(
            HOST,
            HOST.type,
            f"quantizing on the CPU: {gpu.name} has {free} of memory free, and the largest block takes about "
            f"{needed_bytes / 1e9:.1f} GB; --device cuda tries it nonetheless",
        )
    return ChosenDevice(gpu.device, gpu.name, f"quantizing on {gpu.name}, which has {free} of memory free")


@contextmanager
def telling_when_full(chosen: ChosenDevice) -> Iterator[None]:
    """Raises DeviceFull where a GPU has no memory left for what is done meanwhile."""
    try:
        yield
    except RuntimeError as error:
        if chosen.device == HOST or not _is_out_of_memory(error):
            raise
        raise DeviceFull(
            f"{chosen.name} has no memory left for a block of this model: end other programs that use it, and the same "
            "command goes on after the last finished block; --device cpu does without the GPU, from the beginning"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had no memory for a tensor, or for what its libraries keep."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY_SIGNS)


def device_of(module: nn.Module) -> torch.device:
    """Where the module's weights are; all of them are on one device. The host for one without weights."""
    return next((parameter.device for parameter in module.parameters()), HOST)


def on_host(weight: PackedWeight) -> PackedWeight:
    """The weight as it is written."""
    return replace(weight, codes=weight.codes.to(HOST), scales=weight.scales.to(HOST), zeros=weight.zeros.to(HOST))
