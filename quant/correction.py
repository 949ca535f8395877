"""Moves a linear's weights so that with the inputs it will get it gives what the original gave with the original's.

Layers that are quantized before change a linear's inputs. A least-squares step on its weights, before they are
rounded, takes back what of that is linear (GPTAQ, arXiv 2504.02692; Qronos, arXiv 2505.11695). Where a linear adds to
the residual stream it makes up for the stream's own drift, too: errors then stop growing from block to block.

Legend: N = out features, K = in features, X and Y = inputs in the original and in the quantized model [tokens, K],
T = what the outputs should be [tokens, N].
"""

from collections.abc import Mapping
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
    """Sums over tokens, for the linears that read one input: its gram Y^T Y [K, K], and what their outputs should be.

    targets: T^T Y [N, K] of those that add to the residual stream, T being what puts the stream right after them.
    cross: X^T Y [K, K], which gives the targets of the others; None where there are none.
    """

    gram: Tensor
    cross: Tensor | None
    targets: Mapping[str, Tensor]

    def __add__(self, other: "Moments") -> "Moments":
        cross = None if self.cross is None or other.cross is None else self.cross + other.cross
        targets = {name: target + other.targets[name] for name, target in self.targets.items()}
        return Moments(self.gram + other.gram, cross, targets)

    def unscale_(self, scale: Tensor, square: Tensor) -> None:
        """Make them those of inputs Y before they were divided by scale [K], in place; square: its outer product."""
        self.gram.mul_(square)
        if self.cross is not None:
            self.cross.mul_(scale)
        for target in self.targets.values():
            target.mul_(scale)

    def target(self, name: str, weight: Tensor, step: int) -> Tensor:
        """What every step-th output of the named linear should be, against the inputs: T^T Y [N / step, K].

        weight: those rows of the linear's.
        """
        if name in self.targets:
            return self.targets[name][::step]
        if self.cross is None:
            raise KeyError(f"nothing is known of what {name} should give")
        return weight @ self.cross


@dataclass(frozen=True)
class SplitMoments:
    """The moments of most tokens, which weights are fitted to, and of the rest, which tell how well that carries."""

    fit: Moments
    held_out: Moments


def correct(weights: Mapping[str, Tensor], moments: SplitMoments) -> dict[str, Tensor]:
    """The weights V [N, K] that minimise |T - V Y|^2 + r |W - V|^2 over the tokens, for weights W [N, K] by name.

    T is W X, and where the linear adds to the stream W X + E, E being how far the stream has drifted.
    V = (T^T Y + r W) (Y^T Y + r)^-1. The ridge r is the one of RIDGES whose V, fitted to most tokens, is best
    on the rest, for each linear its own; where none is better there than W, that is returned: little text, or text of
    many kinds, moves little. So is W where float32 cannot solve for V: with few tokens the rounding of the products
    that were summed can outweigh a small ridge. All linears read one input.
    """
    ridges = _choose_ridges(weights, moments)
    corrected = dict(weights)
    chosen = [ridge for ridge in dict.fromkeys(ridges.values()) if ridge is not None]
    whole = moments.fit + moments.held_out if chosen else moments.fit
    for ridge in chosen:
        names = [name for name in weights if ridges[name] == ridge]
        rows = torch.cat([weights[name] for name in names])
        target = torch.cat([whole.target(name, weights[name], 1) for name in names])
        solved = _solve(rows, target, whole.gram, ridge)
        if solved is not None:
            corrected |= zip(names, torch.split(solved, [len(weights[name]) for name in names]), strict=True)
    return corrected


def _choose_ridges(weights: Mapping[str, Tensor], moments: SplitMoments) -> dict[str, float | None]:
    """The best ridge of each linear; None where the weight is better as it is."""
    steps = {name: -(-len(weight) // RANKING_ROWS) for name, weight in weights.items()}
    samples = {name: weight[:: steps[name]] for name, weight in weights.items()}
    sizes = [len(sample) for sample in samples.values()]
    fitted, held_out = (
        torch.cat([part.target(name, sample, steps[name]) for name, sample in samples.items()])
        for part in (moments.fit, moments.held_out)
    )
    rows = torch.cat(list(samples.values()))

    def errors(candidate: Tensor) -> list[float]:
        """Of each linear |T - V Y|^2 on the held-out tokens, less what does not depend on V."""
        by_row = ((candidate @ moments.held_out.gram - 2 * held_out) * candidate).sum(dim=1)
        return [float(part.sum()) for part in torch.split(by_row, sizes)]

    tried: dict[float | None, list[float]] = {None: errors(rows)}
    for ridge in RIDGES:
        solved = _solve(rows, fitted, moments.fit.gram, ridge)
        if solved is not None:
            tried[ridge] = errors(solved)
    # the first of equals: a weight that gains nothing stays as it is
    return {name: min(tried, key=lambda ridge: tried[ridge][place]) for place, name in enumerate(weights)}


def _solve(weight: Tensor, target: Tensor, gram: Tensor, ridge: float) -> Tensor | None:
    """V for one ridge; None where float32 does not hold the penalised gram as positive definite."""
    power = gram.diagonal().mean().clamp(min=SMALLEST_POWER)
    penalty = ridge * power
    penalised = gram.clone()
    penalised.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(penalised)
    del penalised
    if failed:
        return None
    return torch.cholesky_solve((target + penalty * weight).T, factor).T.contiguous()
