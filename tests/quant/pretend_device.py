"""A device that torch takes for another one than the CPU, made of CPU tensors: what CUDA refuses, it refuses.

Importing this registers it with torch, for as long as the process lives. It computes what the CPU computes, to the bit,
and it raises MixedDevicesError where one operation reads a tensor of each device, unless one of them is a single value.
It has `limit_bytes` of memory; more is torch's OutOfMemoryError. It shows nothing of what a GPU's own kernels give.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU = torch.device("cpu")
Function = Callable[..., object]
# these look into a tensor's memory by themselves, or choose what to do by its device
UNWRAPPED = (Tensor.item, Tensor.tolist, functional.scaled_dot_product_attention)
# operations that take a tensor from one device to another
CROSSING = ("aten::copy_", "aten::_to_copy")


class MixedDevicesError(RuntimeError):
    pass


class Memory:
    """What the device's tensors take: counted by the memory that they share, from the first of them to the last."""

    def __init__(self) -> None:
        self.limit_bytes = 2**40
        self.num_operations = 0
        self.num_bytes = 0
        self.peak_bytes = 0
        self._owners: dict[int, int] = {}
        self._lock = threading.RLock()

    def count(self, tensor: Tensor, held: Tensor) -> None:
        place, num_bytes = held.untyped_storage().data_ptr(), held.untyped_storage().nbytes()
        with self._lock:
            if place not in self._owners:
                if self.num_bytes + num_bytes > self.limit_bytes:
                    raise torch.OutOfMemoryError("the pretend device is full")
                self.num_bytes += num_bytes
                self.peak_bytes = max(self.peak_bytes, self.num_bytes)
            self._owners[place] = self._owners.get(place, 0) + 1
        weakref.finalize(tensor, self._drop, place, num_bytes)

    def _drop(self, place: int, num_bytes: int) -> None:
        with self._lock:
            self._owners[place] -= 1
            if not self._owners[place]:
                del self._owners[place]
                self.num_bytes -= num_bytes


MEMORY = Memory()


class PretendTensor(Tensor):
    """A tensor of the device; `held` is the CPU's that it is made of."""

    held: Tensor

    @staticmethod
    def __new__(cls: type["PretendTensor"], held: Tensor) -> "PretendTensor":
        made: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        MEMORY.count(made, held)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func in UNWRAPPED:
            return compute(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # inference mode hands it on in one piece
        if _name(func) == "aten::to":
            return func.decompose(*args, **(kwargs or {}))
        return compute(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.held!r})"


def compute(func: Function, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
    """The operation, done by the CPU on what the device's tensors are made of."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if _name(func) not in CROSSING and any(tensor.dim() and not _is_pretend(tensor) for tensor in tensors):
        places = ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise MixedDevicesError(f"{_name(func)} reads tensors of both devices: {places}")
    MEMORY.num_operations += 1
    goes_to_cpu = _name(func) == "aten::_to_copy" and kwargs.get("device") == CPU
    output = func(*tree_map(_unwrap, args), **tree_map(_unwrap, dict(kwargs)))
    if goes_to_cpu:
        return output
    # what was changed in place, or given as an output, stays the tensor that it is
    same = {id(_unwrap(tensor)): tensor for tensor in tensors}

    def wrap(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else PretendTensor(value)

    return tree_map(wrap, output)


def _name(func: Function) -> str:
    return func.name().split(".")[0] if isinstance(func, torch._ops.OpOverload) else str(func)


def _is_pretend(value: object) -> bool:
    return isinstance(value, PretendTensor)


def _unwrap(value: object) -> object:
    if isinstance(value, PretendTensor):
        return value.held
    return CPU if isinstance(value, torch.device) and value.type == NAME else value


class _Backend:
    """What torch asks of a device's module, and the quantizer of a GPU's."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        return MEMORY.limit_bytes - MEMORY.num_bytes, MEMORY.limit_bytes

    def max_memory_allocated(self, device: object = None) -> int:
        return MEMORY.peak_bytes

    def empty_cache(self) -> None:
        pass


class _MadeOnTheCpu(TorchFunctionMode):
    """torch.tensor(device=) does not ask the dispatcher, which is all that the device has."""

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        if func is torch.tensor and torch.device(cast(str, named.get("device") or CPU)).type == NAME:
            del named["device"]
            return cast(Tensor, func(*args, **named)).to(DEVICE)
        return func(*args, **named)


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
_MadeOnTheCpu().__enter__()
