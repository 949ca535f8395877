"""Searches the input scales of linears that share one input (AWQ, arXiv 2306.00978, section 3.2). Changes no weight.

Legend: N = out features of a linear, K = in features, C = channels of the operation that makes the input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.input_statistics import InputStatistics
from quant.rounding import round_plainly, split_groups

# the scale of 1
IDENTITY = "identity"
# the paper's grid for the exponent, 0 excluded: that is the identity
EXPONENTS = tuple(index / 20 for index in range(1, 21))
# magnitudes below this would make scales that float16 cannot hold
SMALLEST_MAGNITUDE = 1e-4
# stands for the output of an all-zero weight, whose error is 0 as well
SMALLEST_SIGNAL = 1e-30
# candidates are ranked on evenly spread rows: the scale is shared by all rows, so a sample ranks as all of them do
RANKING_ROWS = 64


@dataclass(frozen=True)
class ChannelSpread:
    """How C channels of the feeding operation reach K inputs: every run of `width` channels comes `repeats` times.

    A norm has repeats 1. With grouped-query attention each value head (width: the head's) feeds `repeats` query heads.
    """

    width: int
    repeats: int

    def expand(self, per_channel: Tensor) -> Tensor:
        """[C] to [K]."""
        return per_channel.view(-1, 1, self.width).expand(-1, self.repeats, -1).reshape(-1)

    def average(self, per_input: Tensor) -> Tensor:
        """[K] to [C], the mean over the repeats."""
        return per_input.view(-1, self.repeats, self.width).mean(dim=1).reshape(-1)


@dataclass(frozen=True)
class SharedInput:
    """Linears that read one input: their weights float32 [N, K], what is known of the input, how it is fed."""

    weights: Sequence[Tensor]
    statistics: InputStatistics
    spread: ChannelSpread


@dataclass(frozen=True)
class Grouping:
    """How weights are rounded: `bits` a code, `group_size` input channels a scale (WHOLE_ROW: all of them)."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class ScaleCandidate:
    """A scale float32 [C], and the formula it came from: identity, x^a, or x^a/w^(1-a)."""

    name: str
    scale: Tensor


@dataclass(frozen=True)
class ScaleChoice:
    """The best candidate; and of every linear tr(W G W^T), and what it loses by plain rounding as a share of that."""

    candidate: ScaleCandidate
    signals: tuple[float, ...]
    plain_losses: tuple[float, ...]


def search_scale(shared: SharedInput, grouping: Grouping) -> ScaleChoice:
    """The candidate of the least loss. The identity is one of them, so the choice is never worse than plain rounding.

    The loss is the sum over the linears of tr(D G D^T) / tr(W G W^T), with the effective error D = W - round(W s) / s.
    """
    unscaled = keep_unscaled(shared, grouping)
    sample = replace(shared, weights=[weight[:: -(-weight.shape[0] // RANKING_ROWS)] for weight in shared.weights])
    sample_signals = signals_of(sample)
    best = min(
        scale_candidates(shared, grouping.group_size),
        key=lambda candidate: sum(_losses(candidate, sample, sample_signals, grouping)),
    )
    if sum(_losses(best, shared, unscaled.signals, grouping)) >= sum(unscaled.plain_losses):
        return unscaled
    return replace(unscaled, candidate=best)


def keep_unscaled(shared: SharedInput, grouping: Grouping) -> ScaleChoice:
    """The identity with its numbers."""
    signals = signals_of(shared)
    num_channels = shared.weights[0].shape[1] // shared.spread.repeats
    identity = ScaleCandidate(IDENTITY, torch.ones(num_channels))
    return ScaleChoice(identity, signals, _losses(identity, shared, signals, grouping))


def scale_candidates(shared: SharedInput, group_size: int) -> Iterator[ScaleCandidate]:
    """The paper's x^a and AutoAWQ's x^a / w^(1-a), normalised so that sqrt(max * min) is 1."""
    magnitude = shared.spread.average(shared.statistics.mean_magnitude).clamp(min=SMALLEST_MAGNITUDE)
    weight_magnitude = shared.spread.average(relative_magnitude(shared.weights, group_size)).clamp(SMALLEST_MAGNITUDE)
    for exponent in EXPONENTS:
        activation = exponent * magnitude.log()
        yield ScaleCandidate(f"x^{exponent:.2f}", _normalised(activation))
        weight = (1 - exponent) * weight_magnitude.log()
        yield ScaleCandidate(f"x^{exponent:.2f}/w^{1 - exponent:.2f}", _normalised(activation - weight))


def relative_magnitude(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """[K]: the mean over all rows of |w| beside the largest |w| of its group (AutoAWQ quantizer.py)."""
    groups = split_groups(torch.cat(list(weights)).abs(), group_size)
    largest = groups.amax(dim=-1, keepdim=True)
    relative = groups / largest.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.flatten(relative, start_dim=-2).mean(dim=0)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """The mean squared output error per row of difference [N, K] for inputs of gram [K, K]: diag(D G D^T), [N]."""
    return ((difference @ gram) * difference).sum(dim=-1)


def signals_of(shared: SharedInput) -> tuple[float, ...]:
    """tr(W G W^T) of every linear: its mean squared output, which errors are measured against."""
    return tuple(float(output_error(weight, shared.statistics.gram).sum()) for weight in shared.weights)


def relative_loss(difference: Tensor, gram: Tensor, signal: float) -> float:
    """tr(D G D^T) as a share of the signal."""
    return float(output_error(difference, gram).sum()) / max(signal, SMALLEST_SIGNAL)


def _losses(
    candidate: ScaleCandidate, shared: SharedInput, signals: Sequence[float], grouping: Grouping
) -> tuple[float, ...]:
    scale = shared.spread.expand(candidate.scale)
    losses = []
    for weight, signal in zip(shared.weights, signals, strict=True):
        difference = weight - round_plainly(weight * scale, grouping.group_size, grouping.bits) / scale
        losses.append(relative_loss(difference, shared.statistics.gram, signal))
    return tuple(losses)


def _normalised(logarithm: Tensor) -> Tensor:
    # in log space: max * min of the values themselves underflows where a channel is nearly dead
    return (logarithm - (logarithm.max() + logarithm.min()) / 2).exp()
