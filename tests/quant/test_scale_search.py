"""The scale search: never worse than plain rounding, better where channels differ, one scale for repeated heads."""

import pytest
import torch

from kernels.weight_kinds import WHOLE_ROW
from quant.input_statistics import InputStatistics
from quant.rounding import round_plainly
from quant.scale_search import (
    ChannelSpread,
    Grouping,
    ScaleCandidate,
    SharedInput,
    output_error,
    refine_salient,
    scale_candidates,
    search_scale,
    signals_of,
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


def on_its_grid(num_features: int) -> torch.Tensor:
    """A weight that plain rounding leaves as it is: every group holds all 16 codes, times 1."""
    return torch.arange(16.0).repeat(8, num_features // 16)


def loss_of(shared: SharedInput, scale: torch.Tensor, grouping: Grouping = GROUPING) -> float:
    """The search's loss of a scale [C], from its definition, in float64."""
    expanded, gram = shared.spread.expand(scale), shared.statistics.gram.double()
    total = 0.0
    for weight in shared.weights:
        rounded = round_plainly(weight * expanded, grouping.group_size, grouping.bits) / expanded
        error = output_error((weight - rounded).double(), gram).sum()
        total += float(error / output_error(weight.double(), gram).sum())
    return total


def refined(shared: SharedInput, scale: torch.Tensor, grouping: Grouping = GROUPING) -> ScaleCandidate:
    return refine_salient(ScaleCandidate("given", scale), shared, signals_of(shared), grouping)


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
    # plain rounding is exact and nothing can be better
    choice = search_scale(
        SharedInput([on_its_grid(64)], statistics_of(salient_inputs(64)), ChannelSpread(width=64, repeats=1)), GROUPING
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


@pytest.mark.parametrize("channel_scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_refining_never_raises_the_loss(bits: int, channel_scale: float) -> None:
    grouping = Grouping(bits, 32)
    shared = SharedInput(
        [weight_of(40, 192), weight_of(8, 192) * 100], statistics_of(salient_inputs(192)), ChannelSpread(192, 1)
    )
    scale = torch.ones(192)
    scale[::17] = channel_scale
    before = loss_of(shared, scale, grouping)
    after = refined(shared, scale, grouping)
    assert loss_of(shared, after.scale, grouping) <= before
    if after.name == "given":
        assert torch.equal(after.scale, scale)


def test_refining_lowers_the_loss_where_a_salient_channel_wants_another_scale() -> None:
    # given a weight on its grid, but for the scale of its one salient channel, which makes the group's range too wide
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 31] *= 20
    shared = SharedInput([on_its_grid(64)], statistics_of(inputs), ChannelSpread(64, 1))
    scale = torch.ones(64)
    scale[31] = 2
    # when it is refined, then the channel's scale is halved and rounding is exact again
    after = refined(shared, scale)
    assert after.name == "given refined"
    assert after.scale.tolist() == [1.0] * 64
    assert loss_of(shared, scale) > 0
    assert loss_of(shared, after.scale) == 0


def test_refining_changes_salient_channels_only_and_each_by_half_at_most() -> None:
    # 300 channels: three are salient
    inputs = torch.randn(400, 320, generator=torch.Generator().manual_seed(1))
    inputs[:, [5, 100, 250]] *= 20
    shared = SharedInput([weight_of(40, 320)], statistics_of(inputs), ChannelSpread(320, 1))
    factors = refined(shared, torch.ones(320)).scale
    assert set(factors.ne(1).nonzero().flatten().tolist()) <= {5, 100, 250}
    assert bool(factors.ne(1).any())
    assert 0.5 <= float(factors.min()) <= float(factors.max()) <= 1.5


def test_refining_keeps_a_scale_that_nothing_improves() -> None:
    shared = SharedInput([on_its_grid(64)], statistics_of(salient_inputs(64)), ChannelSpread(64, 1))
    candidate = ScaleCandidate("identity", torch.ones(64))
    assert refine_salient(candidate, shared, signals_of(shared), GROUPING) is candidate


def test_a_channel_of_a_repeated_head_is_refined_in_all_its_repeats() -> None:
    # one value head of width 32 that two query heads read; its channel 31 has a scale that is twice too large
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, [31, 63]] *= 20
    shared = SharedInput([on_its_grid(64)], statistics_of(inputs), ChannelSpread(width=32, repeats=2))
    scale = torch.ones(32)
    scale[31] = 2
    after = refined(shared, scale)
    assert after.scale.tolist() == [1.0] * 32
    assert loss_of(shared, after.scale) == 0


def test_refining_stays_finite_with_dead_channels_and_zero_weights() -> None:
    inputs, weight = torch.zeros(50, 64), torch.zeros(8, 64)
    weight[:, 32:] = weight_of(8, 32)
    inputs[:, 40] = 1
    for known in (statistics_of(inputs), statistics_of(torch.zeros(50, 64))):
        shared = SharedInput([weight, torch.zeros(4, 64)], known, ChannelSpread(64, 1))
        after = search_scale(shared, GROUPING).candidate
        assert bool(torch.isfinite(after.scale).all())
        assert float(after.scale.min()) > 0


def test_one_scale_a_row_is_not_refined() -> None:
    shared = SharedInput([weight_of(40, 96)], statistics_of(salient_inputs(96)), ChannelSpread(96, 1))
    assert refined(shared, torch.ones(96), Grouping(4, WHOLE_ROW)).name == "given"


def test_what_helps_the_sampled_rows_is_dropped_where_all_rows_together_lose_by_it() -> None:
    # given rows of which the search samples every second one: half channel 31 would make their rounding exact, but the
    # rows between lie on their grids already and are a thousand times larger
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 31] *= 20
    weight = on_its_grid(64).repeat(16, 1)
    weight[::2, 31] *= 2
    weight[1::2] *= 1000
    spread = ChannelSpread(64, 1)
    sample = SharedInput([weight[::2]], statistics_of(inputs), spread)
    assert refined(sample, torch.ones(64)).name == "given refined"
    # when all are searched, then the scale stays 1
    choice = search_scale(SharedInput([weight], sample.statistics, spread), GROUPING)
    assert choice.candidate.name == "identity"
    assert bool((choice.candidate.scale == 1).all())


def test_a_refined_choice_says_so() -> None:
    # given a weight that the scale of one channel keeps from being exact, so that no formula of the grid is better
    inputs = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 31] *= 20
    weight = on_its_grid(64)
    weight[:, 31] *= 2
    choice = search_scale(SharedInput([weight], statistics_of(inputs), ChannelSpread(64, 1)), GROUPING)
    assert choice.candidate.name.endswith(" refined")
