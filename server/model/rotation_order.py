"""Weights of models that turn neighbouring elements, for kernels that turn the two halves of a head.

Attention sums products over the elements of a head, so any order of them will do if queries and keys have the same: the
elements with even numbers go before those with odd ones, once, when the weights are read.
Legend: N = out features, D = head width, R = elements of a head that turn.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from kernels.layout import PackedWeight
from quant.checkpoint.stored_module import PackedSpec
from server.model.config import ModelConfig
from server.model.expected_tensors import layer_spec
from server.model.weight_source import WeightSource


class TurnedWeights:
    """A WeightSource whose queries and keys, and their norms, have element 2i of a head's first R at i, 2i + 1 at
    R / 2 + i."""

    def __init__(self, weights: WeightSource, config: ModelConfig) -> None:
        self._weights = weights
        self._head_dim = config.head_dim
        self._order = _head_order(config)
        layers = [layer_spec(config, index) for index in range(config.num_layers)]
        norms = [norm for layer in layers for norm in (layer.query_norm, layer.key_norm) if norm is not None]
        self._turned_modules = {*row_orders(config), *(norm.name.removesuffix(".weight") for norm in norms)}

    @property
    def tensor_names(self) -> Collection[str]:
        return self._weights.tensor_names

    def read_tensor(self, name: str) -> Tensor:
        tensor = self._weights.read_tensor(name)
        if name.rpartition(".")[0] not in self._turned_modules:
            return tensor
        # a norm's weight may be [heads, D] or [D], a bias is [N], a weight [N, K]
        if tensor.shape[-1] == self._head_dim and "norm" in name:
            return tensor[..., self._order]
        return tensor[_rows(self._order, len(tensor))]

    def is_quantized(self, module_name: str) -> bool:
        return self._weights.is_quantized(module_name)

    def packed_spec(self, module_name: str) -> PackedSpec:
        return self._weights.packed_spec(module_name)

    def read_packed(self, module_name: str) -> PackedWeight:
        weight = self._weights.read_packed(module_name)
        if module_name not in self._turned_modules:
            return weight
        rows = _rows(self._order, weight.shape[0])
        return replace(weight, codes=weight.codes[rows], scales=weight.scales[rows], zeros=weight.zeros[rows])


def row_orders(config: ModelConfig) -> dict[str, Tensor]:
    """By module, where the outputs of the projections to queries and keys come from: int64 [N].

    Empty for models that turn the two halves of a head.
    """
    if not config.architecture.turns_neighbours:
        return {}
    order = _head_order(config)
    layers = [layer_spec(config, index) for index in range(config.num_layers)]
    return {linear.name: _rows(order, linear.num_outputs) for layer in layers for linear in layer.qkv[:2]}


def _rows(order: Tensor, num_rows: int) -> Tensor:
    """int64 [N]: the heads one after the other, each in the order int64 [D]."""
    return (torch.arange(0, num_rows, len(order))[:, None] + order).flatten()


def _head_order(config: ModelConfig) -> Tensor:
    """int64 [D]: which element of a head comes where."""
    rope = config.layer_ropes[0]
    rotary_dim = config.head_dim if rope is None else rope.rotary_dim
    elements = torch.arange(config.head_dim)
    return torch.cat((elements[:rotary_dim:2], elements[1:rotary_dim:2], elements[rotary_dim:]))
