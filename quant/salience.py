"""Which input channels of a linear matter most, and what share of its output error they carry. It changes no weight.

The claim of AWQ (arXiv 2306.00978, section 3.1), measured on the model at hand: about 1 % of the channels, picked by
the magnitude of what they carry, matter far more than the rest; picked by their weights' norm they do not.

Legend: N = out features, K = in features, D = W - Q [N, K] what rounding changes, G = X^T X / tokens [K, K].
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# what the paper calls salient
SALIENT_SHARE = 0.01


@dataclass(frozen=True)
class ChannelErrors:
    """Shares of one total, the output error of plain rounding: what some channels carry of it, plain and as written."""

    plain: float
    chosen: float


@dataclass(frozen=True)
class Salience:
    """channels: the salient input channels, by mean |x|, the largest first; by_magnitude: their errors.

    by_weight: the errors of as many channels that are picked by the norm of their weights instead.
    """

    channels: tuple[int, ...]
    by_magnitude: ChannelErrors
    by_weight: ChannelErrors


@dataclass(frozen=True)
class LinearChannels:
    """A linear before anything changed it, by input channel, each float32 [K].

    mean_magnitude: mean |x|. weight_norm: the norm of the channel's column of weights. plain_errors: what plain
    rounding does to it (channel_errors).
    """

    mean_magnitude: Tensor
    weight_norm: Tensor
    plain_errors: Tensor


def describe_channels(
    weight: Tensor, differences: Iterable[Tensor], gram: Tensor, mean_magnitude: Tensor
) -> LinearChannels:
    """weight: float32 [N, K]. differences: what plain rounding changes in it, some rows after the others.

    gram [K, K] and mean_magnitude [K] of its input.
    """
    return LinearChannels(mean_magnitude, weight.norm(dim=0), channel_errors(differences, gram))


def channel_errors(differences: Iterable[Tensor], gram: Tensor) -> Tensor:
    """[K]: each input channel's part of tr(D G D^T), the sum over the outputs of (D G)[n, k] D[n, k].

    differences: D, some rows after the others. The parts add up to the whole. One may be negative: its error then
    undoes some of the others'. Folding a scale s into a linear and 1/s into its input leaves them as they are.
    """
    errors = gram.new_zeros(len(gram))
    for rows in differences:
        errors += ((rows @ gram) * rows).sum(dim=0)
    return errors


def measure_salience(channels: LinearChannels, chosen_errors: Tensor) -> Salience:
    """How the salient channels fare by plain rounding and as written, whose channel_errors are chosen_errors [K]."""
    num_salient = max(1, round(SALIENT_SHARE * len(channels.mean_magnitude)))
    by_magnitude = channels.mean_magnitude.topk(num_salient).indices
    by_weight = channels.weight_norm.topk(num_salient).indices
    return Salience(
        channels=tuple(by_magnitude.tolist()),
        by_magnitude=_errors_of(by_magnitude, channels.plain_errors, chosen_errors),
        by_weight=_errors_of(by_weight, channels.plain_errors, chosen_errors),
    )


def _errors_of(picked: Tensor, plain_errors: Tensor, chosen_errors: Tensor) -> ChannelErrors:
    # a weight that is on its grid already has no error to share out
    total = max(float(plain_errors.sum()), torch.finfo(torch.float32).tiny)
    return ChannelErrors(float(plain_errors[picked].sum()) / total, float(chosen_errors[picked].sum()) / total)
