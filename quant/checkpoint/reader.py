"""Reads a checkpoint directory: everything about it is checked at `open`, before any tensor is loaded.

Whether a module is quantized is decided per module from the tensors that are there; the config only says how to read
them. Loads no pickle, changes no file.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint import awq_gemm
from quant.checkpoint.meta import AWQ, GEMM, QuantizationMeta, parse_meta
from quant.checkpoint.tensor_files import StoredTensor, find_tensors, read_json_object
from quant.checkpoint.tensor_spec import TensorSpec
from quant.errors import CheckpointError

CONFIG_FILE = "config.json"
QUANTIZED_SUFFIX = "qweight"


class CheckpointReader:
    """An opened checkpoint. Its tensors are memory-mapped copies on demand; close nothing."""

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

    @classmethod
    def open(cls, directory: Path) -> "CheckpointReader":
        """Check the config, the index, every file's header and every quantized module's shapes.

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
        try:
            meta = parse_meta(config)
        except CheckpointError as error:
            raise CheckpointError(f"{config_file}: {error}") from error
        reader = cls(directory, config, meta, tensors)
        for module_name in reader.quantized_module_names:
            reader.packed_shape(module_name)
        return reader

    @property
    def tensor_names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def quantized_module_names(self) -> tuple[str, ...]:
        return tuple(name for name in self._names_by_module if self.is_quantized(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).spec.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._find(name).spec.dtype

    def read_tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, in its stored dtype. Raises CheckpointError when there is none of that name."""
        with safe_open(self._find(name).file, framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def is_quantized(self, module_name: str) -> bool:
        return f"{module_name}.{QUANTIZED_SUFFIX}" in self._tensors

    def tensor_names_of(self, module_name: str) -> tuple[str, ...]:
        """The full names of the tensors that belong to the module itself, not to its children."""
        return self._names_by_module.get(module_name, ())

    def packed_shape(self, module_name: str) -> tuple[int, int]:
        """(N, K) of a quantized module, from the headers alone. Raises CheckpointError when its tensors disagree."""
        return awq_gemm.check_specs(self._specs_of(module_name), self._meta_for(module_name).group_size, module_name)

    def read_packed(self, module_name: str) -> PackedWeight:
        """The module's weight in ROW_MAJOR on the CPU; scales in their stored dtype.

        Raises CheckpointError naming the tensor when it is missing, of the wrong shape or not finite.
        """
        meta = self._meta_for(module_name)
        return DECODERS[meta.quant_method, meta.version](self, module_name, meta)

    def _find(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        return self._tensors[name]

    def _specs_of(self, module_name: str) -> dict[str, TensorSpec]:
        return {name.rpartition(".")[2]: self._tensors[name].spec for name in self.tensor_names_of(module_name)}

    def _meta_for(self, module_name: str) -> QuantizationMeta:
        if not self.is_quantized(module_name):
            raise CheckpointError(f"{self.directory} has no tensor {module_name}.{QUANTIZED_SUFFIX}")
        if self.meta is None:
            raise CheckpointError(
                f"{module_name} is quantized, but {self.directory / CONFIG_FILE} has no quantization_config; "
                "add it (quant_method, bits, group_size, version) or fetch the checkpoint again"
            )
        return self.meta


def _read_awq_gemm(reader: CheckpointReader, module_name: str, meta: QuantizationMeta) -> PackedWeight:
    reader.packed_shape(module_name)
    qweight, qzeros, scales = (reader.read_tensor(f"{module_name}.{suffix}") for suffix in awq_gemm.SUFFIXES)
    return awq_gemm.decode(awq_gemm.AwqGemmTensors(qweight, qzeros, scales), meta.group_size, module_name)


# (quant_method, version) to its decoder: the formats that parse_meta lets through
DECODERS: dict[tuple[str, str], Callable[[CheckpointReader, str, QuantizationMeta], PackedWeight]] = {
    (AWQ, GEMM): _read_awq_gemm
}
