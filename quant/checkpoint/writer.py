"""Writes a checkpoint directory that appears whole or not at all: a hidden sibling folder, then one rename.

Quantizes nothing and knows no model: it is handed tensors, packed weights, the config and the side files.
"""

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint.output_format import ENCODERS, OutputFormat, quantization_config
from quant.checkpoint.reader import CONFIG_FILE, CheckpointReader
from quant.checkpoint.stored_module import PackedSpec, spec_of
from quant.checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE
from quant.errors import OutputError, WriteError

# a shard is held in memory until it is written, and many tools read a checkpoint shard by shard
DEFAULT_SHARD_BYTES = 2 * 1024**3


class CheckpointWriter:
    """Use as a context manager: leaving it without `commit` removes everything that was written.

    `directory` is the hidden folder.
    """

    def __init__(
        self,
        out: Path,
        *,
        expected_bytes: int,
        output_format: OutputFormat = OutputFormat.AWQ,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Reserve the place for `out`. Folders that killed runs left for the same `out` are removed.

        Raises OutputError when `out` exists, cannot be created, or the disk has less than expected_bytes free.
        """
        self._out = out.absolute()
        self._expected_bytes = expected_bytes
        self._output_format = output_format
        self._packed: dict[str, PackedSpec] = {}
        self._shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[str, ...]] = []
        self._names: set[str] = set()
        self._total_bytes = 0
        check_place(out)
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale_folders(self._out)
            self._check_free_space()
            self.directory = Path(tempfile.mkdtemp(prefix=_partial_prefix(self._out), dir=self._out.parent))
            self.directory.chmod(0o755)
            self._lock = _lock_folder(self.directory)
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error}") from error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pending.clear()
        # after commit the folder has its final name, and there is nothing left to remove
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of the tensor under `name`; a full shard is written out at once.

        Raises ValueError when the name was added before, OutputError when the disk is full.
        """
        if name in self._names:
            raise ValueError(f"{name} was added to the checkpoint before")
        self._names.add(name)
        tensor_bytes = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + tensor_bytes > self._shard_bytes:
            self._write_shard()
        # a copy, because the caller may fold scales into its tensor before the shard is written
        self._pending[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._pending_bytes += tensor_bytes
        self._total_bytes += tensor_bytes

    def add_packed(self, module_name: str, weight: PackedWeight) -> None:
        """Encode a ROW_MAJOR weight in the writer's format, as tensors named after the module.

        Raises ValueError for what `output_format.check_fits` refuses, QuantizationError when a scale does not fit.
        """
        for suffix, tensor in ENCODERS[self._output_format](weight).items():
            self.add_tensor(f"{module_name}.{suffix}", tensor)
        self._packed[module_name] = spec_of(weight)

    def quantization_config(self, kept: Sequence[str]) -> dict[str, object]:
        """What config.json must say of the packed weights added so far; kept: the linears that stayed as they were."""
        return quantization_config(self._output_format, self._packed, kept)

    def commit(self, config: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        """Write what is pending, the index, config.json and `files` (by name), check it all, and rename into place.

        `config` holds its `quantization_config` already. Raises OutputError when the disk is full or `out` appeared
        meanwhile, CheckpointError when what was written is no valid checkpoint.
        """
        self._write_shard()
        try:
            self._name_shards()
            for name, content in {CONFIG_FILE: _json_bytes(config), **files}.items():
                (self.directory / name).write_bytes(content)
            for path in self.directory.iterdir():
                # safetensors writes files that only their owner can read; a server may be another user
                path.chmod(0o644)
                _flush_to_disk(path)
            _flush_to_disk(self.directory)
        except OSError as error:
            raise self._failure(str(error)) from error
        CheckpointReader.open(self.directory)
        self._rename()

    def _write_shard(self) -> None:
        if not self._pending:
            return
        file = self.directory / _unnumbered(len(self._shards))
        try:
            save_file(self._pending, file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise self._failure(str(error)) from error
        self._shards.append(tuple(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def _name_shards(self) -> None:
        """Give the shards their final names, which hold the number of shards, and write the index."""
        num_shards = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = SINGLE_FILE if num_shards == 1 else f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
            (self.directory / _unnumbered(number)).rename(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        if num_shards != 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            (self.directory / INDEX_FILE).write_bytes(_json_bytes(index))

    def _rename(self) -> None:
        if os.path.lexists(self._out):
            raise OutputError(f"{self._out} appeared while the checkpoint was being written; nothing was replaced")
        try:
            self.directory.rename(self._out)
            _flush_to_disk(self._out.parent)
        except OSError as error:
            raise WriteError(f"{self._out} cannot be written: {error}") from error

    def _check_free_space(self) -> None:
        free_bytes = shutil.disk_usage(self._out.parent).free
        if free_bytes < self._expected_bytes:
            raise OutputError(
                f"{self._out} needs about {_megabytes(self._expected_bytes)}, but {self._out.parent} has "
                f"{_megabytes(free_bytes)} free; free some space or choose another disk"
            )

    def _failure(self, reason: str) -> WriteError:
        free_bytes = shutil.disk_usage(self._out.parent).free
        needed_bytes = max(self._expected_bytes, self._total_bytes)
        return WriteError(
            f"{self._out} cannot be written: {reason}. It needs about {_megabytes(needed_bytes)}; "
            f"{_megabytes(free_bytes)} were free when it failed"
        )


def check_place(out: Path) -> None:
    """Raises OutputError when `out` exists, or the nearest folder above it that exists cannot be written to."""
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; choose another place or remove it")
    parent = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise OutputError(f"{out} cannot be written: {parent} is no directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be written: no permission to write in {parent}")


def _partial_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _unnumbered(number: int) -> str:
    return f"shard-{number + 1:05d}.safetensors"


def _lock_folder(folder: Path) -> int:
    """Hold the folder: the lock goes when its process does, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _remove_stale_folders(out: Path) -> None:
    """Remove the hidden folders of runs that are dead; a living run holds the lock of its own."""
    for folder in out.parent.glob(f"{glob.escape(_partial_prefix(out))}*"):
        if not folder.is_dir():
            continue
        try:
            descriptor = _lock_folder(folder)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                continue
            raise
        shutil.rmtree(folder)
        os.close(descriptor)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 10**6 else f"{num_bytes / 1e3:.0f} kB"
