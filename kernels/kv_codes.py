"""Codes of 8 bits for keys and values, in plain torch: the definition that the write kernel matches bit for bit.

A vector of a head is stored as codes and one float32 scale: number = code * scale. Symmetric, the scale from the
vector's own largest magnitude, so that nothing is calibrated and no token depends on another.
Legend: D = head width.
"""

import torch
from torch import Tensor

# uint8 holds -127 .. 127 as 1 .. 255: or-ed into the bits of fp16's 1024, an unsigned byte is converted for nothing
INT8_OFFSET = 128
# the largest code of each type: what the largest magnitude of a vector becomes
LARGEST_CODES = {torch.uint8: 127.0, torch.float8_e4m3fn: 448.0}
CODE_DTYPES = tuple(LARGEST_CODES)
# smaller vectors are coded as if they were this large: 1 / scale stays finite
SMALLEST_AMPLITUDE = 2.0**-60


def encode(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [..., D] and scales float32 [...] of vectors [..., D]. dtype: one of CODE_DTYPES.

    A vector with an infinity or a NaN gets the scale NaN: it is not finite when read back, and no other is touched.
    """
    numbers = vectors.float()
    largest = LARGEST_CODES[dtype]
    amplitudes = numbers.abs().amax(-1).clamp_min(SMALLEST_AMPLITUDE)
    finite = amplitudes.isfinite()
    # a number over a tensor is its reciprocal times the number to torch, which rounds twice
    ratios = numbers * (torch.full_like(amplitudes, largest) / amplitudes)[..., None]
    ratios = torch.where(finite[..., None], ratios, 0.0)
    scales = torch.where(finite, amplitudes / largest, float("nan"))
    codes = ratios if dtype.is_floating_point else ratios.round() + INT8_OFFSET
    return codes.to(dtype), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., D] of codes [..., D] and scales [...]."""
    numbers = codes.float()
    if not codes.dtype.is_floating_point:
        numbers -= INT8_OFFSET
    return numbers * scales[..., None]
