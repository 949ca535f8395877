"""Moves a linear's weights so that with the inputs it will get it gives what the original gave with the original's.

Layers that are quantized before change a linear's inputs. A least-squares step on its weights, before they are
rounded, takes back what of that is linear (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Where a linear adds to
the residual stream it makes up for the stream's own drift, too: errors then stop growing from block to block.

Legend: N = out features, K = in features, X and Y = inputs in the original and in the quantized model [tokens, K].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# how much a change of the weights costs, as a share of the mean power of the inputs; the last leaves nearly all as is
RIDGES = (0.03, 0.2, 1.0, 5.0)
# ridges are ranked on evenly spread rows: all rows read the same input, so a sample ranks as all of them do
RANKING_ROWS = 256
# of inputs that are all zero
SMALLEST_POWER = 1e-12


@dataclass(frozen=True)
class Moments:
    """Sums over tokens: gram Y^T Y [K, K], cross X^T Y [K, K], and drift E^T Y [N, K], where E is what the linear's
    output has to add for the residual stream to be the original's; None where the linear does not add to it."""

    gram: Tensor
    cross: Tensor
    drift: Tensor | None

    def __add__(self, other: "Moments") -> "Moments":
        drift = None if self.drift is None or other.drift is None else self.drift + other.drift
        return Moments(self.gram + other.gram, self.cross + other.cross, drift)

    def of_rows(self, step: int) -> "Moments":
        """The moments of every step-th row of the weight."""
        return Moments(self.gram, self.cross, None if self.drift is None else self.drift[::step])

    def unscaled(self, scale: Tensor) -> "Moments":
        """The moments of inputs Y before they were divided by scale [K]."""
        drift = None if self.drift is None else self.drift * scale
        return Moments(self.gram * (scale[:, None] * scale[None, :]), self.cross * scale, drift)

    def target(self, weight: Tensor) -> Tensor:
        """What a weight's outputs should be, against the inputs: (W X^T + E^T) Y [N, K]."""
        target = weight @ self.cross
        return target if self.drift is None else target + self.drift


@dataclass(frozen=True)
class SplitMoments:
    """The moments of most tokens, which weights are fitted to, and of the rest, which tell how well that carries."""

    fit: Moments
    held_out: Moments


def correct(weight: Tensor, moments: SplitMoments) -> Tensor:
    """The weight V [N, K] that minimises |W X + E - V Y|^2 + r |W - V|^2 over the tokens, for weight W [N, K].

    V = ((W X^T + E^T) Y + r W) (Y^T Y + r)^-1. The ridge r is the one of RIDGES whose V, fitted to most tokens, is best
    on the rest; where none is better there than W, that is returned: little text, or text of many kinds, moves little.
    """
    step = -(-len(weight) // RANKING_ROWS)
    sample, fit, held_out = weight[::step], moments.fit.of_rows(step), moments.held_out.of_rows(step)
    chosen, least = None, _error(sample, sample, held_out)
    for ridge in RIDGES:
        error = _error(_solve(sample, fit, ridge), sample, held_out)
        if error < least:
            chosen, least = ridge, error
    return weight if chosen is None else _solve(weight, moments.fit + moments.held_out, chosen)


def _error(candidate: Tensor, weight: Tensor, moments: Moments) -> float:
    """|W X + E - V Y|^2 less what does not depend on V."""
    return float(((candidate @ moments.gram - 2 * moments.target(weight)) * candidate).sum())


def _solve(weight: Tensor, moments: Moments, ridge: float) -> Tensor:
    power = moments.gram.diagonal().mean().clamp(min=SMALLEST_POWER)
    penalty = ridge * power
    # the ridge makes it positive definite by a margin that float32 holds, whatever the tokens
    factor = torch.linalg.cholesky(moments.gram + penalty * torch.eye(len(moments.gram)))
    return torch.cholesky_solve((moments.target(weight) + penalty * weight).T, factor).T.contiguous()
