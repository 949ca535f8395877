"""The scale search: never worse than plain rounding, better where channels differ, one scale for repeated heads."""

import torch

from quant.input_statistics import InputStatistics
from quant.rounding import round_plainly
from quant.scale_search import (
    ChannelSpread,
    Grouping,
    SharedInput,
    output_error,
    scale_candidates,
    search_scale,
)

GROUPING = Grouping(bits=4, group_size=32)


def statistics_of(inputs: torch.Tensor) -> InputStatistics:
    return InputStatistics(gram=inputs.T @ inputs / len(inputs), mean_magnitude=inputs.abs().mean(dim=0))


def salient_inputs(num_features: int) -> torch.Tensor:
    """Inputs where a few channels are far larger than the others, as in real models."""
    inputs = torch.randn(200, num_features, generator=torch.Generator().manual_seed(1))
    inputs[:, ::17] *= 20
    return inputs


def weight_of(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def test_the_gram_loss_is_the_error_on_the_inputs_themselves() -> None:
    inputs, difference = salient_inputs(96).double(), weight_of(5, 96).double()
    replayed = (inputs @ difference.T).square().mean(dim=0)
    torch.testing.assert_close(output_error(difference, inputs.T @ inputs / len(inputs)), replayed)


def test_large_input_channels_get_a_scale_that_lowers_the_loss() -> None:
    inputs, weight = salient_inputs(96), weight_of(40, 96)
    statistics = statistics_of(inputs)
    choice = search_scale(SharedInput([weight], statistics, ChannelSpread(width=96, repeats=1)), GROUPING)
    plain = float(output_error(weight - round_plainly(weight, 32, 4), statistics.gram).sum())
    scaled = round_plainly(weight * choice.candidate.scale, 32, 4) / choice.candidate.scale
    assert float(output_error(weight - scaled, statistics.gram).sum()) < 0.7 * plain
    assert choice.candidate.name != "identity"


def test_the_identity_wins_where_no_scale_helps() -> None:
    # every weight already lies on its group's grid: plain rounding is exact and nothing can be better
    weight = torch.arange(16.0).repeat(8, 4)
    choice = search_scale(
        SharedInput([weight], statistics_of(salient_inputs(64)), ChannelSpread(width=64, repeats=1)), GROUPING
    )
    assert choice.candidate.name == "identity"
    assert bool((choice.candidate.scale == 1).all())


def test_candidates_stay_finite_with_dead_channels_and_zero_weights() -> None:
    inputs, weight = salient_inputs(64), weight_of(8, 64)
    inputs[:, 3] = 0
    weight[:, :32] = 0
    shared = SharedInput([weight], statistics_of(inputs), ChannelSpread(width=64, repeats=1))
    for candidate in scale_candidates(shared, 32):
        assert bool(torch.isfinite(candidate.scale).all()), candidate.name
        assert float(candidate.scale.min()) > 0, candidate.name


def test_repeated_heads_share_one_scale() -> None:
    # two value heads of width 3, each read by two query heads
    spread = ChannelSpread(width=3, repeats=2)
    expanded = spread.expand(torch.arange(6.0))
    assert expanded.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    assert spread.average(expanded).tolist() == [0, 1, 2, 3, 4, 5]


def test_all_linears_of_an_input_count_in_its_scale() -> None:
    inputs = salient_inputs(96)
    weights = [weight_of(8, 96), weight_of(64, 96) * 100]
    choice = search_scale(SharedInput(weights, statistics_of(inputs), ChannelSpread(width=96, repeats=1)), GROUPING)
    gram = statistics_of(inputs).gram

    def loss(scale: torch.Tensor) -> float:
        differences = [weight - round_plainly(weight * scale, 32, 4) / scale for weight in weights]
        return sum(
            float(output_error(difference, gram).sum() / output_error(weight, gram).sum())
            for difference, weight in zip(differences, weights, strict=True)
        )

    assert loss(choice.candidate.scale) < loss(torch.ones(96))
