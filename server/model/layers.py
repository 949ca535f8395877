"""The decoder's parts: linear layers and norms. Each holds its frozen tensors; none loads or decides.

Legend: T = tokens of the step, K = in features, N = out features.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import dispatch
from kernels.layout import PackedWeight
from kernels.lora import AdapterRows, LoraStack


class Linear(Protocol):
    """x [T, K] to [T, N] in x's dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class DenseLinear:
    """weight [N, K] and bias [N], in the dtype of the activations."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class QuantizedLinear:
    """weight in the device's run-time layout; bias [N] in the dtype of the activations."""

    weight: PackedWeight
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return dispatch.quantized_linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class JoinedLinear:
    """Layers that share their input but not their kind (some quantized, some not): outputs side by side."""

    parts: tuple[Linear, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


def apply_adapted(linear: Linear, x: Tensor, stack: LoraStack | None, rows: AdapterRows | None) -> Tensor:
    """linear(x), and what adapters add to it: those of the layer, for the step's rows that have one."""
    output = linear(x)
    if stack is not None and rows is not None:
        dispatch.add_lora(output, x, stack, rows)
    return output


@dataclass(frozen=True)
class ProjectionNorms:
    """Normalizes queries and keys among joined [T, N], in rows of the shape of their norms' weights, side by side."""

    query_norm: "RmsNorm | LayerNorm"
    key_norm: "RmsNorm | LayerNorm"

    def __call__(self, joined: Tensor) -> Tensor:
        num_queries, num_keys = self.query_norm.weight.numel(), self.key_norm.weight.numel()
        queries, keys, values = joined.tensor_split([num_queries, num_queries + num_keys], dim=-1)
        normed = [
            norm(heads.view(len(joined), *norm.weight.shape)).flatten(1)
            for norm, heads in ((self.query_norm, queries), (self.key_norm, keys))
        ]
        return torch.cat((*normed, values), dim=-1)


class Norm(Protocol):
    """Of the last axis of x, in x's dtype."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and that sum."""
        ...


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * weight, computed in float32."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, self.epsilon)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return dispatch.add_rms_norm(x, residual, self.weight, self.epsilon)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean(x)) / std(x) * weight, computed in float32; weight may have leading axes of x, too."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=self.epsilon)
        return (normed * self.weight.float()).to(x.dtype)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return self(total), total


@dataclass(frozen=True)
class NoNorm:
    """In the place of a norm that an architecture has not."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return total, total
