"""Rounds weights column after column, each with the error that the columns before it left (GPTQ, arXiv 2210.17323).

Legend: N = out features, K = in features, G = groups along K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.cholesky import factor_in_place
from quant.errors import QuantizationError
from quant.rounding import GroupGrid

# how much of the correlations between channels is not believed (Ledoit and Wolf, "A well-conditioned estimator for
# large-dimensional covariance matrices", 2004): other text has others, and errors go where this text has little power
SHRINKAGE = 0.3
# added to the gram's diagonal, as a share of its mean: inputs that the calibration never saw must not explode
DAMPING = 0.01
# a gram that float32 cannot factor gets ten times the damping, so often at most
MAX_DAMPING_RETRIES = 6
# columns whose errors are spread among themselves at once, and over all later columns in one product after that
BLOCK_COLUMNS = 64


@dataclass(frozen=True)
class FeedbackFactor:
    """What is worked out of an input's gram [K, K] for all rows of all linears that read it.

    order: int64 [K], the columns by rising input power. factor: float32 [K, K], unit lower triangular; the gram in that
    order, shrunk and damped, is factor D factor^T with a diagonal D.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def of(cls, gram: Tensor) -> "FeedbackFactor":
        """Raises QuantizationError when the gram cannot be factored."""
        power = gram.diagonal()
        mean_power = power.mean().clamp(min=torch.finfo(torch.float32).tiny)
        order = power.argsort()
        damping = DAMPING
        for _ in range(1 + MAX_DAMPING_RETRIES):
            # symmetric, so it is its own transpose
            factor = gram[order[:, None], order].T
            factor.mul_(1 - SHRINKAGE).diagonal().copy_(power[order] + damping * mean_power)
            if factor_in_place(factor):
                return cls(order, factor.div_(factor.diagonal().clone()))
            # let go before the next is made
            del factor
            damping *= 10
        raise QuantizationError(
            f"an input's gram matrix of {len(gram)} channels cannot be factored, damped up to {damping:g}"
        )


def round_with_feedback(weight: Tensor, feedback: FeedbackFactor, grid: GroupGrid, bits: int) -> Tensor:
    """weight float32 [N, K] on its groups' grids so that tr(D G D^T), D its error, is small for inputs of the gram G
    that was factored, and for inputs that correlate less.

    Columns go by falling input power ("act-order"): the most important ones are rounded while all others can still
    make up for them. The grid stays that of each column's own group, so no `g_idx` is needed. Returns float32 [N, K].

    What a column takes on is the sum of the errors before it, each times its entry of the factor of the gram itself:
    the same as GPTQ's updates by the factor of the inverse (QuIP, arXiv 2307.13304, section 3 and theorem 6), for a
    third of the work before the first column.
    """
    order, factor = feedback.order, feedback.factor
    groups = (order // (weight.shape[1] // grid.scales.shape[1])).tolist()
    # columns as rows: contiguous, so that a column is one read
    columns = weight.T[order].contiguous()
    grids = _ColumnGrids.of(grid, bits)
    errors = torch.empty_like(columns)
    for end in range(len(columns), 0, -BLOCK_COLUMNS):
        block = slice(max(0, end - BLOCK_COLUMNS), end)
        wanted = torch.addmm(columns[block], factor[end:, block].T, errors[end:])
        _round_columns(wanted, factor[block, block], grids, groups[block], errors[block].copy_(columns[block]))
        columns[block] = wanted
    rounded = torch.empty_like(columns)
    rounded[order] = columns
    return rounded.T.contiguous()


@dataclass(frozen=True)
class _ColumnGrids:
    """Of every group the scale of each row and the steps of it that its codes reach down and up, each [G, N]."""

    scales: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, grid: GroupGrid, bits: int) -> "_ColumnGrids":
        zeros = grid.zeros.T.contiguous()
        return cls(grid.scales.T.contiguous(), -zeros, 2**bits - 1 - zeros)


def _round_columns(wanted: Tensor, factor: Tensor, grids: _ColumnGrids, groups: list[int], errors: Tensor) -> None:
    """Round a block of columns [B, N] of these groups from the last to the first, each taking on the errors after it.

    wanted: the columns with all errors after the block; rounded afterwards. errors: the columns themselves; what they
    lose afterwards.
    """
    for index in reversed(range(len(groups))):
        scale = grids.scales[groups[index]]
        column = wanted[index].div_(scale).round_()
        column.clamp_(grids.lowest[groups[index]], grids.highest[groups[index]]).mul_(scale)
        errors[index].sub_(column)
        wanted[:index].addr_(factor[index, :index], errors[index])
