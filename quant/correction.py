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

from quant.cholesky import factor_in_place
from quant.gram_sums import SplitGramSum

# how much a change of the weights costs, as a share of the mean power of the inputs; the last leaves nearly all as is
RIDGES = (0.03, 0.2, 1.0, 5.0)
# ridges are ranked on evenly spread rows: all rows read the same input, so a sample ranks as all of them do. So many
# are solved for at a time
RANKING_ROWS = 256
# of inputs that are all zero
SMALLEST_POWER = 1e-12


@dataclass(frozen=True)
class TargetSums:
    """Sums over tokens of what the outputs of linears that read one input should be, against that input.

    targets: T^T Y [N, K] of those that add to the residual stream, T being what puts the stream right after them.
    cross: X^T Y [K, K], which gives the targets of the others; None where there are none.
    """

    cross: Tensor | None
    targets: Mapping[str, Tensor]

    def scale_(self, scale: Tensor) -> None:
        """Make them those of inputs Y that are multiplied by scale [K], in place."""
        for sums in (*([] if self.cross is None else [self.cross]), *self.targets.values()):
            sums.mul_(scale)

    def of(self, name: str, weight: Tensor, rows: "slice[int | None, int | None, int | None]") -> Tensor:
        """T^T Y of these rows of the named linear, whose weight has these rows: float32 as weight."""
        if name in self.targets:
            return self.targets[name][rows]
        if self.cross is None:
            raise KeyError(f"nothing is known of what {name} should give")
        return weight @ self.cross


@dataclass(frozen=True)
class SplitMoments:
    """The sums of all tokens, and of those that nothing is fitted to, which tell how well what is fitted carries over.

    held_out: its targets have only the rows of `ranking_rows`.
    """

    grams: SplitGramSum
    whole: TargetSums
    held_out: TargetSums

    def scale_(self, scale: Tensor) -> None:
        """Make them those of inputs Y that are multiplied by scale [K], in place."""
        self.grams.scale_(scale)
        self.whole.scale_(scale)
        self.held_out.scale_(scale)


def ranking_rows(num_rows: int) -> "slice[None, None, int]":
    """RANKING_ROWS of a linear's rows, evenly spread."""
    return slice(None, None, -(-num_rows // RANKING_ROWS))


def correct_(weights: Mapping[str, Tensor], moments: SplitMoments) -> Tensor:
    """Make of weights W [N, K] by name, in place, the V that minimise |T - V Y|^2 + r |W - V|^2 over the tokens.

    T is W X, and where the linear adds to the stream W X + E, E being how far the stream has drifted.
    V = (T^T Y + r W) (Y^T Y + r)^-1. The ridge r is the one of RIDGES whose V, fitted to most tokens, is best
    on the rest, for each linear its own; where none is better there than W, that stays: little text, or text of
    many kinds, moves little. So does W where float32 cannot solve for V: with few tokens the rounding of the products
    that were summed can outweigh a small ridge. All linears read one input.

    Returns Y^T Y of all tokens [K, K]; it has the moments' memory, and they mean nothing any more.
    """
    ridges = _choose_ridges(weights, moments)
    gram = moments.grams.merge()
    for ridge in dict.fromkeys(ridges.values()):
        solver = None if ridge is None else _RidgeSolver.of(gram.T.clone(), ridge)
        for name, weight in weights.items():
            if solver is not None and ridges[name] == ridge:
                for start in range(0, len(weight), RANKING_ROWS):
                    rows = slice(start, start + RANKING_ROWS)
                    weight[rows] = solver.solve(weight[rows], moments.whole.of(name, weight[rows], rows))
    return gram


def _choose_ridges(weights: Mapping[str, Tensor], moments: SplitMoments) -> dict[str, float | None]:
    """The best ridge of each linear; None where the weight is better as it is."""
    sampled = {name: ranking_rows(len(weight)) for name, weight in weights.items()}
    samples = {name: weight[sampled[name]] for name, weight in weights.items()}
    sizes = [len(sample) for sample in samples.values()]
    whole = torch.cat([moments.whole.of(name, sample, sampled[name]) for name, sample in samples.items()])
    held_out = torch.cat([moments.held_out.of(name, sample, slice(None)) for name, sample in samples.items()])
    rows = torch.cat(list(samples.values()))

    def errors(candidate: Tensor) -> list[float]:
        """Of each linear |T - V Y|^2 on the held-out tokens, less what does not depend on V."""
        by_row = ((moments.grams.held_out_product(candidate) - 2 * held_out) * candidate).sum(dim=1)
        return [float(part.sum()) for part in torch.split(by_row, sizes)]

    tried: dict[float | None, list[float]] = {None: errors(rows)}
    for ridge in RIDGES:
        solver = _RidgeSolver.of(moments.grams.fit(), ridge)
        if solver is not None:
            tried[ridge] = errors(solver.solve(rows, whole - held_out))
        # let go before the next is made
        del solver
    # the first of equals: a weight that gains nothing stays as it is
    return {name: min(tried, key=lambda ridge: tried[ridge][place]) for place, name in enumerate(weights)}


@dataclass(frozen=True)
class _RidgeSolver:
    """factor: Cholesky's, of the gram with the penalty on its diagonal."""

    factor: Tensor
    penalty: Tensor

    @classmethod
    def of(cls, gram: Tensor, ridge: float) -> "_RidgeSolver | None":
        """In the memory of gram [K, K], which lies column by column; None where float32 does not hold it as positive
        definite.
        """
        penalty = ridge * gram.diagonal().mean().clamp(min=SMALLEST_POWER)
        gram.diagonal().add_(penalty)
        return cls(gram, penalty) if factor_in_place(gram) else None

    def solve(self, weight: Tensor, target: Tensor) -> Tensor:
        """V [R, K] for rows of the weight and of T^T Y, each [R, K]."""
        # two steps, because cholesky_solve copies the factor
        half = torch.linalg.solve_triangular(self.factor, (target + self.penalty * weight).T, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(self.factor.T, half, upper=True)
        return solved.T
