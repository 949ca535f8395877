"""The range search: the loss on the calibration inputs never rises, and 0 stays inside every range."""

import pytest
import torch

from kernels.weight_kinds import WHOLE_ROW
from quant.clip_search import rows_at_a_time, search_range
from quant.rounding import full_range, grid_of, round_onto
from quant.scale_search import Grouping, output_error


def correlated_gram(num_features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 8, generator=generator) @ torch.randn(8, num_features, generator=generator)
    inputs += 0.3 * torch.randn(300, num_features, generator=generator)
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("group_size", [32, WHOLE_ROW])
@pytest.mark.parametrize("shape", [(1, 32), (6, 96), (11, 576)])
def test_the_loss_of_every_row_is_at_most_that_of_the_full_range(shape: tuple[int, int], group_size: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    gram = correlated_gram(shape[1])
    searched = grid_of(search_range(weight, gram, Grouping(bits=4, group_size=group_size)), 4)
    widest = grid_of(full_range(weight, group_size), 4)
    loss = output_error(weight - round_onto(weight, searched, 4), gram)
    plain = output_error(weight - round_onto(weight, widest, 4), gram)
    assert bool((loss <= plain * (1 + 1e-4)).all())


def test_correlated_inputs_let_the_errors_of_groups_cancel() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(5))
    gram = correlated_gram(128)
    searched = grid_of(search_range(weight, gram, Grouping(bits=4, group_size=32)), 4)
    widest = grid_of(full_range(weight, 32), 4)
    loss = output_error(weight - round_onto(weight, searched, 4), gram).sum()
    plain = output_error(weight - round_onto(weight, widest, 4), gram).sum()
    assert float(loss / plain) < 0.5


def test_a_gpu_searches_as_many_rows_at_once_as_take_little_memory() -> None:
    gpu = torch.device("cuda")
    assert [rows_at_a_time(torch.device("cpu"), group_size) for group_size in (32, 128, 11008)] == [64, 64, 64]
    # 25 ranges of so many weights, in 64 MiB of float32
    assert [rows_at_a_time(gpu, group_size) for group_size in (128, 11008, 10**9)] == [5242, 60, 1]


def test_zero_stays_inside_ranges_of_groups_of_one_sign() -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(6)) + 1
    found = search_range(weight, torch.eye(64), Grouping(bits=4, group_size=32))
    assert bool((found.low <= 0).all())
    assert bool((found.high > 0).all())
