"""Where a model's tensors come from, by name."""

from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint.stored_module import PackedSpec


class WeightSource(Protocol):
    """What a model's weights are read from by name: a checkpoint, or whatever else gives them."""

    @property
    def tensor_names(self) -> Collection[str]: ...

    def read_tensor(self, name: str) -> Tensor: ...

    def is_quantized(self, module_name: str) -> bool: ...

    def packed_spec(self, module_name: str) -> PackedSpec: ...

    def read_packed(self, module_name: str) -> PackedWeight:
        """The module's weight in ROW_MAJOR."""
        ...
