"""The angles that queries and keys turn by: from a config's frequencies to the rotation of a step's tokens.

Legend: T = tokens of the step, R = elements of a head that turn.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rotary import Rotation
from server.model.rope_config import LinearScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling


@dataclass(frozen=True)
class Rotary:
    """inverse_frequencies: the angle per position of each pair of elements, float32 [R / 2]. What turned is multiplied
    by scale."""

    inverse_frequencies: Tensor
    scale: float

    def at(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """The rotation of positions int64 [T], angles computed in float32."""
        cosines, sines = self.angles_at(positions)
        return Rotation(
            cosines=torch.cat((cosines, cosines), dim=-1).to(dtype),
            signed_sines=torch.cat((-sines, sines), dim=-1).to(dtype),
        )

    def angles_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines float32 [T, R / 2], with the scale."""
        angles = positions[:, None].float() * self.inverse_frequencies
        if self.scale == 1.0:
            return angles.cos(), angles.sin()
        return angles.cos() * self.scale, angles.sin() * self.scale


def build_rotary(rope: RopeConfig | None, head_dim: int, max_len: int, device: torch.device) -> Rotary:
    """What turns the heads of sequences of up to max_len tokens; without a rope, by no angle at all."""
    if rope is None:
        return Rotary(torch.zeros(head_dim // 2, device=device), 1.0)
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    frequencies = 1.0 / rope.theta**exponents
    scaling, scale = rope.scaling, 1.0
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        frequencies = _scale_llama3(frequencies, scaling)
    elif isinstance(scaling, YarnScaling):
        frequencies, scale = _scale_yarn(frequencies, scaling, rope), scaling.attention_factor
    elif isinstance(scaling, LongRopeScaling):
        is_long = max_len > scaling.original_max_position_embeddings
        factors = torch.tensor(scaling.long_factors if is_long else scaling.short_factors)
        frequencies, scale = 1.0 / (factors * rope.theta**exponents), scaling.attention_factor
    return Rotary(frequencies.to(device), scale)


def _scale_llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position_embeddings / wavelengths
    # 0 where the wavelength is longest and all is divided, 1 where it is shortest and nothing is
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _scale_yarn(frequencies: Tensor, scaling: YarnScaling, rope: RopeConfig) -> Tensor:
    """Source: the paper (arXiv 2309.00071) and transformers, modeling_rope_utils.py, _compute_yarn_parameters."""

    def element_with(turns: float) -> float:
        """Which pair of elements turns so many times in a sequence of the original length."""
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    first, last = element_with(scaling.beta_fast), element_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.rotary_dim - 1)
    # a ramp of no width is a step
    width = last - first if last != first else 0.001
    divided = ((torch.arange(len(frequencies)).float() - first) / width).clamp(0, 1)
    return divided * frequencies / scaling.factor + (1 - divided) * frequencies
