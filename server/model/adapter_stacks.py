"""The adapters of a server side by side, as a layer's linears want them, and what they take of a memory.

Legend: L = adapters, P = modules that a layer has joined, R = rank, K = in features, N = out features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.lora import RANK_MULTIPLE, LoraStack
from kernels.tiles import lora_splits
from quant.errors import CheckpointError
from server.model.adapter import Adapter
from server.model.config import ModelConfig
from server.model.expected_tensors import LinearSpec, layer_spec


@dataclass(frozen=True)
class AdapterStacks:
    """Adapter i of a step's rows is adapters[i]. row_orders: by module, in which order its outputs are loaded."""

    adapters: tuple[Adapter, ...]
    row_orders: Mapping[str, Tensor]

    def read(self, specs: Sequence[LinearSpec], device: torch.device, dtype: torch.dtype) -> LoraStack | None:
        """For modules that share their input, joined in this order; None where no adapter has one of them.

        Raises CheckpointError for values that are no numbers, or none in dtype.
        """
        rank = stacked_rank(self.adapters, specs)
        if rank == 0:
            return None
        widths = tuple(spec.num_outputs for spec in specs)
        num_adapters, num_inputs = len(self.adapters), specs[0].num_inputs
        down = torch.zeros((num_adapters, len(specs), rank, num_inputs), dtype=dtype, device=device)
        up = torch.zeros((num_adapters, sum(widths), rank), dtype=dtype, device=device)
        for index, adapter in enumerate(self.adapters):
            first = 0
            for part, spec in enumerate(specs):
                rows = slice(first, first + spec.num_outputs)
                first = rows.stop
                if own_rank := adapter.rank_of(spec.name):
                    down[index, part, :own_rank] = _cast(adapter, spec.name, adapter.read_down(spec.name), dtype)
                    weights = _cast(adapter, spec.name, adapter.read_up(spec.name), dtype)
                    order = self.row_orders.get(spec.name)
                    up[index, rows, :own_rank] = (weights if order is None else weights[order]).to(device)
        return LoraStack(down.flatten(1, 2), up, widths)


def stacked_rank(adapters: Sequence[Adapter], specs: Sequence[LinearSpec]) -> int:
    """The largest rank that an adapter has in one of the modules, up to what the kernels multiply; 0 for none."""
    largest = max((adapter.rank_of(spec.name) for adapter in adapters for spec in specs), default=0)
    return -(-largest // RANK_MULTIPLE) * RANK_MULTIPLE


def adapter_bytes(adapters: Sequence[Adapter], model: ModelConfig, dtype: torch.dtype) -> int:
    """What the stacks of all layers take."""
    layers = [layer_spec(model, index) for index in range(model.num_layers)]
    num_values = sum(
        stacked_rank(adapters, specs) * sum(linear.num_inputs + linear.num_outputs for linear in specs)
        for layer in layers
        for specs in layer.joined
    )
    return len(adapters) * num_values * dtype.itemsize


def adapter_row_bytes(adapters: Sequence[Adapter], model: ModelConfig) -> int:
    """What a row with an adapter takes on a GPU while one of a layer's linears is computed: its sums, before they are
    added up (kernels.fused_lora)."""
    layers = [layer_spec(model, index) for index in range(model.num_layers)]
    num_sums = (
        lora_splits(specs[0].num_inputs) * len(specs) * stacked_rank(adapters, specs)
        for layer in layers
        for specs in layer.joined
    )
    return max(num_sums, default=0) * torch.float32.itemsize


def _cast(adapter: Adapter, module: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    if not torch.isfinite(rounded).all():
        raise CheckpointError(
            f"the adapter {adapter.name}: {module} holds values that {str(dtype).removeprefix('torch.')} has not; "
            "set dtype to bfloat16"
        )
    return rounded
