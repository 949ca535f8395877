"""Adds up Gram matrices Y^T Y [K, K], which take more memory than the weights they serve: each is kept once.

Of a symmetric matrix only panels on and right of the squares along the diagonal are multiplied; what lies left of them
is the mirror. Where two parts of the tokens are added up apart, the second one has the place of the first one's mirror.

Legend: K = in features of a linear, Y = its inputs [tokens, K], R = rows of some other matrix.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# of a matrix's columns: more panels spare more of the products, up to half, but are slower ones
NUM_PANELS = 3
# the squares of the second part are kept beside the matrix: K times this many numbers, at most
WIDEST_PANEL = 1024


class GramSum:
    """Adds up Y^T Y of all tokens, on the device where they are."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(num_features, num_features, device=device)

    def add(self, weighted: Tensor, rows: Tensor) -> None:
        """Count inputs [tokens, K], given times their weights and as they are."""
        _add_panels(self._sum, weighted, rows)

    def result(self) -> Tensor:
        """The whole sum, in the memory that it was added up in."""
        _mirror(self._sum)
        return self._sum


class SplitGramSum:
    """Adds up Y^T Y of two parts of the tokens, of those to fit to and of those held out, in the memory of one.

    They are on the device where the tokens are.
    """

    def __init__(self, num_features: int, device: torch.device) -> None:
        # on and right of the diagonal squares what is fitted to, left of them the mirror of what is held out
        self._sums = torch.zeros(num_features, num_features, device=device)
        self._held_out_squares = [torch.zeros_like(self._sums[panel, panel]) for panel in _panels(self._sums)]

    def add_fit(self, weighted: Tensor, rows: Tensor) -> None:
        """Count inputs [tokens, K] to fit to, given times their weights and as they are."""
        _add_panels(self._sums, weighted, rows)

    def add_held_out(self, weighted: Tensor, rows: Tensor) -> None:
        """Count inputs [tokens, K] that nothing is fitted to, given times their weights and as they are."""
        for panel, square in zip(_panels(self._sums), self._held_out_squares, strict=True):
            square.addmm_(weighted[:, panel].T, rows[:, panel])
            self._sums[panel, : panel.start].addmm_(weighted[:, panel].T, rows[:, : panel.start])

    def fit(self) -> Tensor:
        """The sum over what is fitted to, [K, K] of its own, with the stride of columns: as Cholesky's factors lie."""
        whole = torch.empty_like(self._sums).T
        whole.copy_(self._sums)
        _mirror(whole)
        return whole

    def held_out_product(self, rows: Tensor) -> Tensor:
        """rows [R, K] times the sum over what is held out."""
        product = torch.zeros_like(rows)
        for panel, square in zip(_panels(self._sums), self._held_out_squares, strict=True):
            left = self._sums[panel, : panel.start]
            product[:, panel].addmm_(rows[:, panel], _symmetric(square)).addmm_(rows[:, : panel.start], left.T)
            product[:, : panel.start].addmm_(rows[:, panel], left)
        return product

    def total(self) -> Tensor:
        """The sum over all tokens, [K, K] of its own."""
        return self._add_up(self._sums.clone())

    def merge(self) -> Tensor:
        """The sum over all tokens, in the memory of both: nothing else can be asked afterwards."""
        return self._add_up(self._sums)

    def scale_(self, scale: Tensor) -> None:
        """Make it the sum of inputs that are multiplied by scale [K]."""
        self._sums.mul_(scale[:, None]).mul_(scale)
        for panel, square in zip(_panels(self._sums), self._held_out_squares, strict=True):
            square.mul_(scale[panel, None]).mul_(scale[panel])

    def _add_up(self, sums: Tensor) -> Tensor:
        for panel, square in zip(_panels(sums), self._held_out_squares, strict=True):
            sums[: panel.start, panel] += sums[panel, : panel.start].T
            sums[panel, panel] += square
        _mirror(sums)
        return sums


def _add_panels(sums: Tensor, weighted: Tensor, rows: Tensor) -> None:
    """Add weighted^T rows on and right of the diagonal squares."""
    for panel in _panels(sums):
        sums[panel, panel.start :].addmm_(weighted[:, panel].T, rows[:, panel.start :])


def _panels(matrix: Tensor) -> "Iterator[slice[int, int]]":
    width = min(-(-len(matrix) // NUM_PANELS), WIDEST_PANEL)
    for start in range(0, len(matrix), width):
        yield slice(start, min(start + width, len(matrix)))


def _mirror(matrix: Tensor) -> None:
    """Make the matrix symmetric by what is on and right of its diagonal."""
    for panel in _panels(matrix):
        matrix[panel, : panel.start] = matrix[: panel.start, panel].T
        matrix[panel, panel] = _symmetric(matrix[panel, panel])


def _symmetric(square: Tensor) -> Tensor:
    return square.triu() + square.triu(1).T
