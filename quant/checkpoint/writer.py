"""Writes a checkpoint directory that appears whole or not at all: a hidden sibling folder, then one rename.

Quantizes nothing and knows no model: it is handed tensors, packed weights, the config and the side files.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint.folded_scales import ModuleScales, encode_folded_scales
from quant.checkpoint.format_name import OutputFormat
from quant.checkpoint.output_format import ENCODERS, quantization_config
from quant.checkpoint.reader import CONFIG_FILE, CheckpointReader
from quant.checkpoint.stored_module import PackedSpec, spec_of
from quant.checkpoint.tensor_files import INDEX_FILE, SINGLE_FILE
from quant.checkpoint.work_folder import WorkFolder, flush_to_disk, folders_for
from quant.errors import DeviceFull, OutputError, QualityError, Terminated, WriteError
from quant.kept_tensors import KeptTensors, Scratch

# many tools read a checkpoint shard by shard
DEFAULT_SHARD_BYTES = 512 * 1024**2
# in the hidden folder: what becomes the checkpoint, and what is finished for a later run to go on with
CHECKPOINT_FOLDER = "checkpoint"
FINISHED_FOLDER = "finished"
# after these a run of the same blocks can succeed later; after any other error it would fail again
PASSING_ERRORS = (WriteError, Terminated, QualityError, DeviceFull)


def accept_none(_finished: Path) -> bool:
    """For a writer that goes on with no other's work."""
    return False


class CheckpointWriter:
    """Use as a context manager: leaving it without `commit` removes everything that was written.

    But what `save_finished` wrote outlives a full disk or GPU, a refused quality, a termination and a kill, and a later
    writer may accept it.
    `directory` is where the checkpoint grows, in the hidden folder; `finished`, beside it, what was saved; `scratch` is
    the hidden folder itself, for files without a name.
    """

    def __init__(
        self,
        out: Path,
        *,
        expected_bytes: int,
        output_format: OutputFormat = OutputFormat.AWQ,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        accepts: Callable[[Path], bool] = accept_none,
    ) -> None:
        """Reserve the place for `out`. Folders that dead runs left for the same `out` are removed.

        But the first whose `finished` folder `accepts` takes is gone on with. expected_bytes: the checkpoint and what
        will be saved as finished. Raises OutputError when `out` exists, cannot be created, or the disk has too little
        room for that.
        """
        self._out = out.absolute()
        self._expected_bytes = expected_bytes
        self._output_format = output_format
        self._packed: dict[str, PackedSpec] = {}
        self._scales: dict[str, ModuleScales] = {}
        self._shard_bytes = shard_bytes
        self._pending_names: list[str] = []
        self._pending_bytes = 0
        self._shards: list[tuple[str, ...]] = []
        self._names: set[str] = set()
        self._total_bytes = 0
        check_place(out)
        try:
            self._folder = WorkFolder.claim(self._out, lambda folder: accepts(folder / FINISHED_FOLDER))
            self.directory = self._folder.path / CHECKPOINT_FOLDER
            self.finished = self._folder.path / FINISHED_FOLDER
            self.scratch = self._folder.path
            self._pending = KeptTensors(Scratch(self.scratch))
            # half a checkpoint is no use: it is written again from what is finished
            shutil.rmtree(self.directory, ignore_errors=True)
            self._reserve()
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error}") from error

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, PASSING_ERRORS) and self.finished.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            self._folder.release()
            if isinstance(error, Terminated):
                error.kept_for = self._out
        else:
            self._folder.remove()

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of the tensor under `name`; a full shard is written out, and a tensor that fills one.

        Raises ValueError when the name was added before, OutputError when the disk is full.
        """
        if name in self._names:
            raise ValueError(f"{name} was added to the checkpoint before")
        self._names.add(name)
        tensor_bytes = tensor.numel() * tensor.element_size()
        self._total_bytes += tensor_bytes
        if self._pending_bytes + tensor_bytes > self._shard_bytes:
            self._write_pending()
        if tensor_bytes >= self._shard_bytes:
            self._write_shard({name: tensor.detach().cpu().contiguous()})
            return
        # a copy, because the caller may fold scales into its tensor before the shard is written
        self._pending.append(tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format))
        self._pending_names.append(name)
        self._pending_bytes += tensor_bytes

    def add_packed(self, module_name: str, weight: PackedWeight) -> None:
        """Encode a ROW_MAJOR weight in the writer's format, as tensors named after the module.

        Raises ValueError for what `output_format.check_fits` refuses, QuantizationError when a scale does not fit.
        """
        for suffix, tensor in ENCODERS[self._output_format](weight).items():
            self.add_tensor(f"{module_name}.{suffix}", tensor)
        self._packed[module_name] = spec_of(weight)

    def add_scales(self, scales: Mapping[str, ModuleScales]) -> None:
        """Note what is folded into modules, by their names; `folded_scales` gives it."""
        self._scales |= scales

    def save_finished(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write a safetensors file into `finished`, whole or not at all; when this returns, it survives a power loss.

        Raises OutputError when the disk is full.
        """
        made, final = self._folder.path / name, self.finished / name
        try:
            self.finished.mkdir(exist_ok=True)
            save_file(dict(tensors), made, metadata=dict(metadata))
            flush_to_disk(made)
            made.rename(final)
            flush_to_disk(self.finished)
            flush_to_disk(self._folder.path)
        except (OSError, SafetensorError) as error:
            made.unlink(missing_ok=True)
            raise self._failure(str(error)) from error

    def quantization_config(self, kept: Sequence[str]) -> dict[str, object]:
        """What config.json must say of the packed weights added so far; kept: the linears that stayed as they were."""
        return quantization_config(self._output_format, self._packed, kept)

    def folded_scales(self) -> bytes:
        """The file that says what is folded into the modules: of all that were added, also where that is none."""
        return encode_folded_scales(self._scales)

    def commit(self, config: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        """Write what is pending, the index, config.json and `files` (by name), check it all, and rename into place.

        `config` holds its `quantization_config` already. Raises OutputError when the disk is full or `out` appeared
        meanwhile, CheckpointError when what was written is no valid checkpoint.
        """
        self._write_pending()
        try:
            self._name_shards()
            for name, content in {CONFIG_FILE: _json_bytes(config), **files}.items():
                (self.directory / name).write_bytes(content)
            for path in self.directory.iterdir():
                # safetensors writes files that only their owner can read; a server may be another user
                path.chmod(0o644)
                flush_to_disk(path)
            flush_to_disk(self.directory)
        except OSError as error:
            raise self._failure(str(error)) from error
        CheckpointReader.open(self.directory)
        self._rename()

    def _write_pending(self) -> None:
        if self._pending_names:
            self._write_shard(dict(zip(self._pending_names, self._pending, strict=True)))
            self._pending = KeptTensors(Scratch(self.scratch))
            self._pending_names.clear()
            self._pending_bytes = 0

    def _write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        file = self.directory / _unnumbered(len(self._shards))
        try:
            save_file(dict(tensors), file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise self._failure(str(error)) from error
        self._shards.append(tuple(tensors))

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
            flush_to_disk(self._out.parent)
        except OSError as error:
            raise WriteError(f"{self._out} cannot be written: {error}") from error

    def _reserve(self) -> None:
        needed_bytes = self._expected_bytes - self._folder.num_bytes()
        free_bytes = shutil.disk_usage(self._out.parent).free
        if free_bytes < needed_bytes:
            # finished work waits for room
            if self.finished.exists():
                self._folder.release()
            else:
                self._folder.remove()
            raise OutputError(
                f"{self._out} needs about {_megabytes(needed_bytes)}, but {self._out.parent} has "
                f"{_megabytes(free_bytes)} free; free some space or choose another disk"
            )
        self.directory.mkdir()
        # a server may be another user, whatever this one's umask is
        self.directory.chmod(0o755)

    def _failure(self, reason: str) -> WriteError:
        free_bytes = shutil.disk_usage(self._out.parent).free
        needed_bytes = max(self._expected_bytes, self._total_bytes)
        kept = "; what is finished is kept, and the same command goes on there" if self.finished.exists() else ""
        return WriteError(
            f"{self._out} cannot be written: {reason}. It needs about {_megabytes(needed_bytes)}; "
            f"{_megabytes(free_bytes)} were free when it failed{kept}"
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


def has_finished_work(out: Path) -> bool:
    """Whether finished work lies beside `out`, whatever the run for `out` it is of."""
    return any((folder / FINISHED_FOLDER).is_dir() for folder in folders_for(out.absolute()))


def _unnumbered(number: int) -> str:
    return f"shard-{number + 1:05d}.safetensors"


def _json_bytes(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 10**6 else f"{num_bytes / 1e3:.0f} kB"
