"""What rotating queries and keys needs: the rotation of a step's tokens, and the norm of heads where there is one.

Legend: T = tokens of the step, D = head width, R = rotated elements of a head, all of them in most models.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """cosines and signed_sines [T, R], in one floating-point dtype: element i of a head pairs with element i + R / 2.

    The sines of the first half are negated: out = x * cosines + (x with its halves exchanged) * signed_sines.
    """

    cosines: Tensor
    signed_sines: Tensor


@dataclass(frozen=True)
class HeadNorms:
    """RMS norm of every query head and key head before the rotation. The weights are [D] in the model's dtype."""

    query_weight: Tensor
    key_weight: Tensor
    epsilon: float
