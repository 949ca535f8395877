"""Searches the range that each group's codes span: a narrower one rounds finer and clips its few largest weights.

Legend: N = out features, K = in features, G = groups along K, g = group size, R = candidate ranges.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.device import CUDA
from quant.rounding import GroupRange, full_range, grid_of, round_onto, split_groups
from quant.scale_search import Grouping
from quant.side_by_side import run_side_by_side

# how far either end of a range may shrink; 1 first, so that a tie keeps the full range
SHRINKAGES = (1.0, 0.93, 0.86, 0.79, 0.72)
# all candidates of so many rows fit in a core's cache; rows don't depend on each other
ROWS_AT_A_TIME = 64
# on a GPU, which starts each operation anew: enough to fill it, and little beside a block
GPU_VALUES_AT_A_TIME = 2**24


@dataclass(frozen=True)
class _Candidates:
    """The shrink factors of both ends, each [R]: every pair of SHRINKAGES."""

    low: Tensor
    high: Tensor


def search_range(weight: Tensor, gram: Tensor, grouping: Grouping) -> GroupRange:
    """The range of every group of weight [N, K] for inputs of gram [K, K], found group by group along K.

    Each group takes the pair of ends that makes tr(D G D^T) of its whole row smallest, given the error D that the
    other groups leave: errors of groups whose inputs are correlated cancel instead of adding up. The full range is
    one of the candidates, so the loss never rises above that of plain rounding.
    """
    parts = torch.split(weight, rows_at_a_time(weight.device, split_groups(weight, grouping.group_size).shape[-1]))
    candidates = _every_pair(weight.device)
    ends = run_side_by_side(lambda rows: _search_rows(rows, gram, candidates, grouping), parts, weight.device)
    return GroupRange(low=torch.cat([end.low for end in ends]), high=torch.cat([end.high for end in ends]))


def rows_at_a_time(device: torch.device, group_size: int) -> int:
    """How many rows are searched at once, in groups of so many inputs."""
    if device.type != CUDA:
        return ROWS_AT_A_TIME
    return max(1, GPU_VALUES_AT_A_TIME // (len(SHRINKAGES) ** 2 * group_size))


def _search_rows(weight: Tensor, gram: Tensor, candidates: _Candidates, grouping: Grouping) -> GroupRange:
    widest = full_range(weight, grouping.group_size)
    group_size = weight.shape[-1] // widest.low.shape[-1]
    difference = weight - round_onto(weight, grid_of(widest, grouping.bits), grouping.bits)
    low, high = widest.low.clone(), widest.high.clone()
    for group in range(low.shape[-1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        ranges = GroupRange(
            low=candidates.low[:, None, None] * widest.low[None, :, group : group + 1],
            high=candidates.high[:, None, None] * widest.high[None, :, group : group + 1],
        )
        errors = weight[:, columns] - round_onto(
            weight[None, :, columns], grid_of(ranges, grouping.bits), grouping.bits
        )
        difference[:, columns] = 0
        losses = _losses(errors, gram[columns, columns], difference @ gram[:, columns])
        best = losses.argmin(dim=0)
        rows = torch.arange(weight.shape[0], device=weight.device)
        difference[:, columns] = errors[best, rows]
        low[:, group], high[:, group] = ranges.low[best, rows, 0], ranges.high[best, rows, 0]
    return GroupRange(low=low, high=high)


def _every_pair(device: torch.device) -> _Candidates:
    factors = torch.tensor(SHRINKAGES, device=device)
    pairs = torch.cartesian_prod(factors, factors)
    return _Candidates(low=pairs[:, 0], high=pairs[:, 1])


def _losses(errors: Tensor, group_gram: Tensor, coupling: Tensor) -> Tensor:
    """Per candidate and row [R, N], how much errors [R, N, g] add to the row's loss beside the other groups' error.

    coupling: the other groups' error times their part of the gram with this group, [N, g].
    """
    losses: Tensor = torch.linalg.vecdot(errors @ group_gram + 2 * coupling, errors)
    return losses
