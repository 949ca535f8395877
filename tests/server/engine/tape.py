"""CUDA graphs without a GPU: every operation of a recording is noted with its very tensors, and replayed on them.

As in a CUDA graph, what was a number of the host's stays what it was, every operand stays where it was, no Python runs
again, and what would wait for the device, or read from the host, is an error.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from server.engine.graph_recorder import Replay

# operations that wait for the device to know a number or a shape, or that bring what is on the host
_WAITING = (
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "item",
    "lift_fresh",
    "masked_select",
    "nonzero",
    "unique",
)
_WAITING_METHODS = (
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "as_tensor",
    "cpu",
    "item",
    "numpy",
    "pin_memory",
    "tensor",
    "tolist",
)
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty")


class CaptureError(Exception):
    """What a CUDA graph cannot hold."""


class Tape:
    """A GraphRecorder for tensors of a CPU. num_replays: of all its recordings."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, run: Callable[[], None]) -> Replay:
        notes = _Notes()
        with _refused_host_data(), notes.launches(), _NoWaiting(notes), notes:
            run()

        @torch.inference_mode()
        def replay() -> None:
            self.num_replays += 1
            for repeat in notes.repeats:
                repeat()

        return replay


class _Notes(TorchDispatchMode):
    """What is to be repeated, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats: list[Callable[[], None]] = []
        # inside of a kernel nothing is noted: all of it is
        self.is_inside_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        kwargs = kwargs or {}
        if not self.is_inside_kernel:
            _refuse_waiting(func, args)
        output = func(*args, **kwargs)
        if not self.is_inside_kernel and func.overloadpacket.__name__ not in _EMPTY:
            self._note(func, args, kwargs, output)
        return output

    def _note(self, func, args, kwargs, output) -> None:  # noqa: ANN001
        if func._schema.is_mutable:
            self.repeats.append(lambda: func(*args, **kwargs))
            return
        taken = {_memory(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        made = [
            (index, tensor)
            for index, tensor in enumerate(tree_leaves(output))
            if isinstance(tensor, Tensor) and _memory(tensor) not in taken
        ]

        def repeat() -> None:
            again = tree_leaves(func(*args, **kwargs))
            for index, tensor in made:
                tensor.copy_(again[index])

        # a view computes nothing
        if made:
            self.repeats.append(repeat)

    @contextmanager
    def launches(self) -> Iterator[None]:
        """Note each launch of an interpreted kernel as one operation."""
        launch = InterpretedFunction.run

        def noted(kernel: InterpretedFunction, *args: object, **kwargs: object) -> None:
            self.is_inside_kernel = True
            launch(kernel, *args, **kwargs)
            self.is_inside_kernel = False
            self.repeats.append(partial(launch, kernel, *args, **kwargs))

        with patch.object(InterpretedFunction, "run", noted):
            yield


class _NoWaiting(TorchFunctionMode):
    """Refuses what a dispatcher does not see: a tensor that lies on the host is read without asking anybody."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if not self._notes.is_inside_kernel and getattr(func, "__name__", "") in _WAITING_METHODS:
            raise CaptureError(f"{func.__name__} waits for the device, or brings what is on the host")
        return func(*args, **(kwargs or {}))


def _refuse_waiting(func, args: Sequence[object]) -> None:  # noqa: ANN001
    name = func.overloadpacket.__name__
    masks = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool]
    if any(name.startswith(word) for word in _WAITING) or (name in ("index", "index_put_") and masks):
        raise CaptureError(f"aten.{name} waits for the device, or brings what is on the host")


@contextmanager
def _refused_host_data() -> Iterator[None]:
    def refused(*_: object) -> None:
        raise CaptureError("from_numpy brings what is on the host")

    with patch.object(torch, "from_numpy", refused):
        yield


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
