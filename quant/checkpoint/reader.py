"""Reads a checkpoint directory: everything about it is checked at `open`, before any tensor is loaded.

Whether a module is quantized is decided per module from the tensors that are there; the config only says how to read
them. Loads no pickle, changes no file.
"""

from pathlib import Path

import torch
from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint.codecs import CODECS, MARKERS, Codec
from quant.checkpoint.meta import QuantizationMeta, parse_meta
from quant.checkpoint.stored_module import PackedSpec, StoredModule
from quant.checkpoint.tensor_files import StoredTensor, find_tensors, read_json_object, read_whole
from quant.errors import CheckpointError

CONFIG_FILE = "config.json"
# where AutoGPTQ and AutoAWQ put their settings before config.json held them, and what they did not say: the method
OLD_SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class CheckpointReader:
    """An opened checkpoint. Its tensors are read on demand, each into memory of its own; no file stays open.

    So whoever drops a tensor gives all of its memory back, and a file that is replaced meanwhile breaks nothing that
    has been read. The pages of a mapped file would count as this process's until its last tensor is gone.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, object],
        meta: QuantizationMeta | None,
        tensors: dict[str, StoredTensor],
    ) -> None:
        self.directory = directory
        self.config = config
        self.meta = meta
        self._tensors = tensors
        self._names_by_module: dict[str, tuple[str, ...]] = {}
        for name in tensors:
            module_name = name.rpartition(".")[0]
            self._names_by_module[module_name] = (*self._names_by_module.get(module_name, ()), name)
        self._packed = {name: self._check_module(name) for name in self._names_by_module if self.is_quantized(name)}

    @classmethod
    def open(cls, directory: Path) -> "CheckpointReader":
        """Check the config, the index, every file's header and every quantized module's shapes and order of inputs.

        Raises CheckpointError naming the file or the tensor, and what to do.
        """
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is no directory; a checkpoint is a directory with a {CONFIG_FILE}")
        config_file = directory / CONFIG_FILE
        if not config_file.is_file():
            raise CheckpointError(f"{directory} has no {CONFIG_FILE}; a checkpoint directory must have one")
        try:
            config = read_json_object(config_file)
            tensors = find_tensors(directory)
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error}") from error
        meta = _parse_config(config_file, config)
        if meta is None and any(name.endswith(MARKERS) for name in tensors):
            meta = _read_old_settings(directory)
        return cls(directory, config, meta, tensors)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def quantized_module_names(self) -> tuple[str, ...]:
        return tuple(self._packed)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).spec.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name).spec.dtype

    def num_bytes(self, name: str) -> int:
        """What the tensor takes on disk."""
        return self._find(name).spec.num_bytes

    def read_tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, in its stored dtype. Raises CheckpointError when there is none of that name."""
        return read_whole(self._find(name))

    def is_quantized(self, module_name: str) -> bool:
        return any(module_name + marker in self._tensors for marker in MARKERS)

    def tensor_names_of(self, module_name: str) -> tuple[str, ...]:
        """The full names of the tensors that belong to the module itself, not to its children."""
        return self._names_by_module.get(module_name, ())

    def packed_spec(self, module_name: str) -> PackedSpec:
        """What a quantized module holds. Raises CheckpointError when the module is not quantized."""
        if module_name not in self._packed:
            raise CheckpointError(f"{self.directory} has no quantized module {module_name}")
        return self._packed[module_name]

    def packed_tensor_names(self, module_name: str) -> tuple[str, ...]:
        """The full names of the tensors that make up a quantized module's weight: neither its bias nor foreign ones."""
        suffixes = self._codec_for(module_name).suffixes
        return tuple(name for name in self.tensor_names_of(module_name) if name.rpartition(".")[2] in suffixes)

    def read_packed(self, module_name: str) -> PackedWeight:
        """The module's weight in ROW_MAJOR on the CPU; scales in their stored dtype.

        Raises CheckpointError when the module is not quantized, or holds a value that cannot be.
        """
        spec = self.packed_spec(module_name)
        names = self.packed_tensor_names(module_name)
        tensors = {name.rpartition(".")[2]: self.read_tensor(name) for name in names}
        return self._codec_for(module_name).decode(module_name, tensors, spec)

    def _find(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        return self._tensors[name]

    def _check_module(self, module_name: str) -> PackedSpec:
        codec, meta = self._codec_for(module_name), self._meta_for(module_name)
        specs = {name.rpartition(".")[2]: self._tensors[name].spec for name in self.tensor_names_of(module_name)}
        values = {
            suffix: self.read_tensor(f"{module_name}.{suffix}") for suffix in codec.value_suffixes if suffix in specs
        }
        return codec.check(StoredModule(module_name, specs, values), meta)

    def _codec_for(self, module_name: str) -> Codec:
        return CODECS[self._meta_for(module_name).format]

    def _meta_for(self, module_name: str) -> QuantizationMeta:
        if self.meta is None:
            raise CheckpointError(
                f"{module_name} is quantized, but {self.directory / CONFIG_FILE} has no quantization_config; "
                "add it (quant_method, bits, group_size, version) or fetch the checkpoint again"
            )
        return self.meta


def _parse_config(file: Path, config: dict[str, object]) -> QuantizationMeta | None:
    try:
        return parse_meta(config)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _read_old_settings(directory: Path) -> QuantizationMeta | None:
    for name, quant_method in OLD_SETTINGS.items():
        file = directory / name
        if file.is_file():
            fields = {"quant_method": quant_method, **read_json_object(file)}
            return _parse_config(file, {"quantization_config": fields})
    return None
