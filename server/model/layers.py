"""The decoder's parts: linear layers, norm, rotation. Each holds its frozen tensors; none loads or decides.

Legend: T = tokens of the step, D = head width, K = in features, N = out features.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import dispatch
from kernels.layout import PackedWeight
from kernels.rotary import Rotation
from server.model.config import RopeConfig


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


@dataclass(frozen=True)
class RmsNorm:
    """x / rms(x) * weight over the last axis, computed in float32."""

    weight: Tensor
    epsilon: float

    def __call__(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, self.epsilon)

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + x, and that sum."""
        return dispatch.add_rms_norm(x, residual, self.weight, self.epsilon)


def rotation_at(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of positions int64 [T], angles computed in float32."""
    angles = positions[:, None].float() * inverse_frequencies
    cosines, sines = angles.cos(), angles.sin()
    return Rotation(
        cosines=torch.cat((cosines, cosines), dim=-1).to(dtype),
        signed_sines=torch.cat((-sines, sines), dim=-1).to(dtype),
    )


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each pair of elements: float32 [D / 2].

    Source of the llama3 blend: transformers, modeling_rope_utils.py, _compute_llama3_parameters.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    # 0 where the wavelength is longest and all is divided, 1 where it is shortest and nothing is
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies
