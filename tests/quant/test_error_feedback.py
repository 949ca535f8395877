"""Error feedback: rounding errors that the inputs' correlations let later columns make up for."""

import torch
from torch import Tensor

from quant.error_feedback import DAMPING, SHRINKAGE, FeedbackFactor, round_with_feedback
from quant.rounding import GroupGrid, full_range, grid_of, round_onto
from quant.scale_search import output_error

BITS, GROUP_SIZE = 4, 32


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(num_features: int) -> Tensor:
    """Of inputs with correlated channels of very different power."""
    mixed = noise(4 * num_features, num_features, seed=1) @ noise(num_features, num_features, seed=2)
    inputs = mixed * torch.logspace(-1, 1, num_features)
    return inputs.T @ inputs / len(inputs)


def grid_for(weight: Tensor) -> GroupGrid:
    return grid_of(full_range(weight, GROUP_SIZE), BITS)


def optimal_brain_quantization(weight: Tensor, gram: Tensor, grid: GroupGrid) -> Tensor:
    """The definition, column by column, on the inverse itself (GPTQ, arXiv 2210.17323, equations 2 and 3)."""
    num_features = weight.shape[1]
    inverse = (gram + DAMPING * gram.diagonal().mean() * torch.eye(num_features)).double().inverse()
    remaining = weight.double().clone()
    for column in gram.diagonal().argsort(descending=True).tolist():
        before = remaining[:, column].clone()
        remaining[:, column] = round_onto(remaining.float(), grid, BITS)[:, column].double()
        error = (before - remaining[:, column]) / inverse[column, column]
        others = inverse[column].clone()
        others[column] = 0
        remaining -= error[:, None] * others
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column], inverse[:, column] = 0, 0
        inverse[column, column] = 1
    return remaining.float()


def test_it_is_optimal_brain_quantization_column_by_column() -> None:
    weight, gram = noise(16, 160, seed=0), gram_of(160)
    grid = grid_for(weight)
    # of Ledoit and Wolf's estimator: a mean of the gram and its diagonal
    shrunk = (1 - SHRINKAGE) * gram + SHRINKAGE * torch.diag(gram.diagonal())
    expected = optimal_brain_quantization(weight, shrunk, grid)
    rounded = round_with_feedback(weight, FeedbackFactor.of(gram), grid, BITS)
    # a value in the middle of two codes may go to either in float32
    assert (rounded == expected).float().mean() > 0.98


def test_every_value_is_on_its_groups_grid() -> None:
    weight = noise(8, 128, seed=0)
    grid = grid_for(weight)
    rounded = round_with_feedback(weight, FeedbackFactor.of(gram_of(128)), grid, BITS)
    assert torch.equal(round_onto(rounded, grid, BITS), rounded)


def test_correlated_inputs_lose_less_than_by_rounding_to_nearest() -> None:
    weight, gram = noise(32, 128, seed=0), gram_of(128)
    grid = grid_for(weight)
    nearest = output_error(weight - round_onto(weight, grid, BITS), gram).sum()
    feedback = output_error(weight - round_with_feedback(weight, FeedbackFactor.of(gram), grid, BITS), gram).sum()
    assert feedback < 0.5 * nearest


def test_inputs_that_correlate_otherwise_lose_less_than_where_the_gram_is_believed() -> None:
    # given text of another kind: channels of the same power, with correlations of their own
    weight, gram = noise(32, 128, seed=0), gram_of(128)
    other = noise(512, 128, seed=7) @ noise(128, 128, seed=8)
    other = other / other.square().mean(dim=0).sqrt() * gram.diagonal().sqrt()
    grid = grid_for(weight)
    shrunk, believed = (
        output_error(weight - rounded, other.T @ other / len(other)).sum()
        for rounded in (
            round_with_feedback(weight, FeedbackFactor.of(gram), grid, BITS),
            optimal_brain_quantization(weight, gram, grid),
        )
    )
    assert shrunk < 0.8 * believed


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = noise(8, 96, seed=0)
    grid = grid_for(weight)
    assert torch.equal(
        round_with_feedback(weight, FeedbackFactor.of(torch.eye(96)), grid, BITS), round_onto(weight, grid, BITS)
    )


def test_a_singular_gram_is_damped() -> None:
    # given dead channels, and fewer tokens than channels
    inputs = noise(10, 64, seed=0)
    inputs[:, 5:9] = 0
    weight = noise(8, 64, seed=1)
    grid = grid_for(weight)
    for gram in (inputs.T @ inputs, torch.zeros(64, 64)):
        rounded = round_with_feedback(weight, FeedbackFactor.of(gram), grid, BITS)
        assert torch.equal(round_onto(rounded, grid, BITS), rounded)
