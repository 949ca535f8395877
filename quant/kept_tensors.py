"""A list of tensors of which the first are in the host's memory and the others in a file."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from quant.device import HOST
from quant.errors import WriteError


@dataclass(frozen=True)
class Scratch:
    """What lists of tensors may take: so many bytes of memory each, and the rest of a folder's disk.

    folder: None for the system's temporary one. A quantization has about seven lists.
    """

    folder: Path | None = None
    memory_bytes: int = 2**26


@dataclass(frozen=True)
class _InFile:
    offset: int
    shape: torch.Size
    dtype: torch.dtype


class KeptTensors:
    """A list of tensors. The first are in memory, as far as that goes; what comes after is read anew each time.

    The file has no name: it is gone with this list, however the program ends.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._kept: list[Tensor | _InFile] = []
        self._num_bytes = 0
        self._file: FileIO | None = None

    def append(self, tensor: Tensor) -> None:
        """Keep it, on the host wherever it is; nobody may change it any more.

        Raises WriteError when the disk is full.
        """
        tensor = tensor.to(HOST)
        self._num_bytes += tensor.nbytes
        if self._num_bytes <= self._scratch.memory_bytes:
            self._kept.append(tensor)
            return
        try:
            if self._file is None:
                # closed with this list
                self._file = tempfile.TemporaryFile(dir=self._scratch.folder, buffering=0)  # noqa: SIM115
            self._kept.append(_InFile(self._file.seek(0, os.SEEK_END), tensor.shape, tensor.dtype))
            _write(self._file, _bytes_of(tensor.contiguous()))
        except OSError as error:
            raise WriteError(
                f"what memory does not take cannot be written to {self._scratch.folder}: {error}"
            ) from error

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        if isinstance(kept, Tensor):
            return kept
        assert self._file is not None
        self._file.seek(kept.offset)
        tensor = torch.empty(kept.shape, dtype=kept.dtype)
        _read(self._file, _bytes_of(tensor))
        return tensor


def _write(file: FileIO, content: memoryview) -> None:
    # a system call takes 2 GB at most
    while content:
        content = content[file.write(content) :]


def _read(file: FileIO, into: memoryview) -> None:
    while into:
        num_read = file.readinto(into)
        if not num_read:
            raise WriteError("a file of what memory does not take ends before what was written to it")
        into = into[num_read:]


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
