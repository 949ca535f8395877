"""Searches the input scales of linears that share one input (AWQ, arXiv 2306.00978, section 3.2). Changes no weight.

Legend: N = out features of a linear, K = in features, C = channels of the operation that makes the input.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.weight_kinds import WHOLE_ROW
from quant.input_statistics import InputStatistics
from quant.rounding import round_plainly, split_groups
from quant.row_spans import row_spans
from quant.salience import SALIENT_SHARE
from quant.side_by_side import run_side_by_side

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
# what the scale of a salient channel is multiplied by, within [0.5, 1.5]; 1 takes an earlier change back
MULTIPLIERS = (0.5, 0.67, 0.8, 1.0, 1.25, 1.5)
REFINEMENT_SWEEPS = 2


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
    """A scale float32 [C], and the formula it came from: identity, x^a, or x^a/w^(1-a); or one of these, refined."""

    name: str
    scale: Tensor


@dataclass(frozen=True)
class ScaleChoice:
    """The best candidate; and of every linear tr(W G W^T), and what it loses by plain rounding as a share of that.

    row_norms: of every linear, the norms of its rows, float32 [N].
    """

    candidate: ScaleCandidate
    signals: tuple[float, ...]
    row_norms: tuple[Tensor, ...]
    plain_losses: tuple[float, ...]


def search_scale(shared: SharedInput, grouping: Grouping) -> ScaleChoice:
    """The candidate of the least loss, then refined on its salient channels where that loses less still.

    The identity is one of the candidates, so the choice is never worse than plain rounding. The loss is the sum over
    the linears of tr(D G D^T) / tr(W G W^T), with the effective error D = W - round(W s) / s.
    """
    unscaled = keep_unscaled(shared, grouping)
    sample = replace(shared, weights=[weight[:: -(-weight.shape[0] // RANKING_ROWS)] for weight in shared.weights])
    sample_signals = signals_of(sample)
    candidates = list(scale_candidates(shared, grouping.group_size))
    ranks = run_side_by_side(
        lambda candidate: sum(_losses(candidate, sample, sample_signals, grouping)),
        candidates,
        shared.statistics.gram.device,
    )
    best = candidates[ranks.index(min(ranks))]
    loss = sum(_losses(best, shared, unscaled.signals, grouping))
    if loss >= sum(unscaled.plain_losses):
        best, loss = unscaled.candidate, sum(unscaled.plain_losses)
    refined = refine_salient(best, sample, sample_signals, grouping)
    if refined is not best and sum(_losses(refined, shared, unscaled.signals, grouping)) < loss:
        best = refined
    return replace(unscaled, candidate=best)


def refine_salient(
    candidate: ScaleCandidate, shared: SharedInput, signals: Sequence[float], grouping: Grouping
) -> ScaleCandidate:
    """The candidate with its salient channels' scales multiplied by the MULTIPLIERS that lower the loss.

    Coordinate descent over the 1 % of channels (at least one) that carry the largest mean |x|, largest first. Returns
    the candidate itself where no multiplier helps, and for WHOLE_ROW: there each try rounds the whole weight again.
    """
    if grouping.group_size == WHOLE_ROW:
        return candidate
    magnitude = shared.spread.average(shared.statistics.mean_magnitude)
    salient = magnitude.topk(max(1, round(SALIENT_SHARE * len(magnitude)))).indices.tolist()
    descent = _ScaleDescent(candidate.scale, shared, signals, grouping)
    for _ in range(REFINEMENT_SWEEPS):
        improved = [descent.improve(channel, candidate.scale[channel]) for channel in salient]
        if not any(improved):
            break
    if torch.equal(descent.scale, candidate.scale):
        return candidate
    return ScaleCandidate(f"{candidate.name} refined", descent.scale)


def keep_unscaled(shared: SharedInput, grouping: Grouping) -> ScaleChoice:
    """The identity with its numbers."""
    signals = signals_of(shared)
    num_channels = shared.weights[0].shape[1] // shared.spread.repeats
    identity = ScaleCandidate(IDENTITY, shared.weights[0].new_ones(num_channels))
    row_norms = tuple(weight.norm(dim=1) for weight in shared.weights)
    return ScaleChoice(identity, signals, row_norms, _losses(identity, shared, signals, grouping))


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
    total, num_rows = torch.zeros_like(weights[0][0]), 0
    for weight in weights:
        for rows in row_spans(weight):
            groups = split_groups(rows.abs(), group_size)
            largest = groups.amax(dim=-1, keepdim=True)
            relative = groups / largest.clamp(min=torch.finfo(torch.float32).tiny)
            total += torch.flatten(relative, start_dim=-2).sum(dim=0)
        num_rows += len(weight)
    return total / num_rows


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """The mean squared output error per row of difference [N, K] for inputs of gram [K, K]: diag(D G D^T), [N]."""
    return ((difference @ gram) * difference).sum(dim=-1)


def signals_of(shared: SharedInput) -> tuple[float, ...]:
    """tr(W G W^T) of every linear: its mean squared output, which errors are measured against."""
    return tuple(total_error(row_spans(weight), shared.statistics.gram) for weight in shared.weights)


def total_error(differences: Iterable[Tensor], gram: Tensor) -> float:
    """tr(D G D^T) for inputs of gram [K, K]; differences: D, some rows after the others."""
    return sum(float(output_error(rows, gram).sum()) for rows in differences)


def relative_loss(differences: Iterable[Tensor], gram: Tensor, signal: float) -> float:
    """total_error as a share of the signal."""
    return total_error(differences, gram) / max(signal, SMALLEST_SIGNAL)


class _ScaleDescent:
    """A scale that changes a channel at a time, with the error D it leaves and D G kept beside it.

    A change rounds only the groups anew that hold the channel: the loss elsewhere is known from D G.
    """

    def __init__(self, scale: Tensor, shared: SharedInput, signals: Sequence[float], grouping: Grouping) -> None:
        self.scale = scale.clone()
        self._grouping = grouping
        self._spread = shared.spread
        self._gram = shared.statistics.gram
        self._weight = torch.cat(list(shared.weights))
        # every row counts by the signal of its linear
        row_signals = [
            weight.new_full((weight.shape[0], 1), max(signal, SMALLEST_SIGNAL))
            for weight, signal in zip(shared.weights, signals, strict=True)
        ]
        self._row_signals = torch.cat(row_signals)
        self._channels = shared.spread.expand(torch.arange(len(scale), device=scale.device))
        every_input = torch.arange(len(self._channels), device=scale.device)
        self._error = self._error_of(every_input, shared.spread.expand(scale)[None])[0]
        self._weighted_error = self._error @ self._gram

    def improve(self, channel: int, base: Tensor) -> bool:
        """Set the channel's scale to the best of base times MULTIPLIERS; whether that lowers the loss.

        Changes nothing where it doesn't.
        """
        inputs = self._inputs_beside(channel)
        tried = base * torch.tensor(MULTIPLIERS, device=base.device)
        scales = torch.where(self._channels[inputs] == channel, tried[:, None], self._spread.expand(self.scale)[inputs])
        steps = self._error_of(inputs, scales) - self._error[:, inputs]
        # tr((D + S) G (D + S)^T) - tr(D G D^T) for the step S, which is 0 outside these inputs
        gradient = steps @ self._gram[inputs][:, inputs] + 2 * self._weighted_error[:, inputs]
        changes = (gradient * steps / self._row_signals).sum(dim=(-2, -1))
        best = int(changes.argmin())
        if float(changes[best]) >= 0:
            return False
        self.scale[channel] = tried[best]
        self._error[:, inputs] += steps[best]
        self._weighted_error += steps[best] @ self._gram[inputs]
        return True

    def _inputs_beside(self, channel: int) -> Tensor:
        """The inputs whose rounding the channel's scale changes: all of the groups that one of its repeats is in."""
        groups = split_groups(self._channels == channel, self._grouping.group_size)
        return groups.any(dim=-1, keepdim=True).expand_as(groups).flatten().nonzero().flatten()

    def _error_of(self, inputs: Tensor, scales: Tensor) -> Tensor:
        """W - round(W s) / s [tries, rows, inputs] of inputs that are whole groups, for scales [tries, inputs]."""
        weight, scales = self._weight[:, inputs], scales[:, None, :]
        return weight - round_plainly(weight * scales, self._grouping.group_size, self._grouping.bits) / scales


def _losses(
    candidate: ScaleCandidate, shared: SharedInput, signals: Sequence[float], grouping: Grouping
) -> tuple[float, ...]:
    scale = shared.spread.expand(candidate.scale)
    losses = []
    for weight, signal in zip(shared.weights, signals, strict=True):
        differences = (
            rows - round_plainly(rows * scale, grouping.group_size, grouping.bits) / scale for rows in row_spans(weight)
        )
        losses.append(relative_loss(differences, shared.statistics.gram, signal))
    return tuple(losses)


def _normalised(logarithm: Tensor) -> Tensor:
    # in log space: max * min of the values themselves underflows where a channel is nearly dead
    return (logarithm - (logarithm.max() + logarithm.min()) / 2).exp()
