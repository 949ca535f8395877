"""Rounds weights column after column, each with the error that the columns before it left (GPTQ, arXiv 2210.17323).

Legend: N = out features, K = in features, G = groups along K.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def round_with_feedback(weight: Tensor, gram: Tensor, grid: GroupGrid, bits: int) -> Tensor:
    """weight float32 [N, K] on its groups' grids so that tr(D G D^T), D its error, is small for inputs of gram [K, K],
    and for inputs that correlate less.

    Columns go by falling input power ("act-order"): the most important ones are rounded while all others can still
    make up for them. The grid stays that of each column's own group, so no `g_idx` is needed. Returns float32 [N, K].
    Raises QuantizationError when the gram cannot be factored.
    """
    order = gram.diagonal().argsort(descending=True)
    factor = _inverse_factor(shrink(gram[order[:, None], order]))
    groups = (order // (weight.shape[1] // grid.scales.shape[1])).tolist()
    # columns as rows: contiguous, so that a column is one read
    columns = weight.T[order].contiguous()
    grids = _ColumnGrids.of(grid, bits)
    for start in range(0, len(columns), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(columns))
        errors = _round_columns(columns[start:end], factor[start:end, start:end], grids, groups[start:end])
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
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


def _round_columns(columns: Tensor, factor: Tensor, grids: _ColumnGrids, groups: list[int]) -> Tensor:
    """Round a block of columns [B, N] of these groups in place, each taking on the errors before it.

    Returns the scaled errors.
    """
    errors = torch.empty_like(columns)
    for index, group in enumerate(groups):
        column, scale = columns[index], grids.scales[group]
        rounded = (column / scale).round_().clamp_(grids.lowest[group], grids.highest[group]).mul_(scale)
        torch.sub(column, rounded, out=errors[index]).div_(factor[index, index])
        column.copy_(rounded)
        columns[index + 1 :].addr_(factor[index, index + 1 :], errors[index], alpha=-1)
    return errors


def shrink(gram: Tensor) -> Tensor:
    """The gram [K, K] with SHRINKAGE of its correlations taken away; the power of the channels stays."""
    shrunk = torch.lerp(gram, gram.new_zeros(()), SHRINKAGE)
    shrunk.diagonal().copy_(gram.diagonal())
    return shrunk


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (gram + damping)^-1, float32 [K, K]."""
    mean_power = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damping = DAMPING
    factor: Tensor
    for _ in range(1 + MAX_DAMPING_RETRIES):
        damped = gram.clone()
        damped.diagonal().add_(damping * mean_power)
        # one name for all: what a step has read is let go before the next
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not failed:
                return factor
        damping *= 10
    raise QuantizationError(
        f"an input's gram matrix of {len(gram)} channels cannot be factored, damped up to {damping:g}"
    )
