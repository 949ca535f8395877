"""The channels' parts of the output error add up to it, and the salient ones are picked by what they carry."""

import pytest
import torch

from quant.salience import ChannelErrors, LinearChannels, channel_errors, describe_channels, measure_salience
from quant.scale_search import output_error


def random_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A difference [3, 5], inputs [40, 5] and their gram [5, 5]."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 5, generator=generator)
    return torch.randn(3, 5, generator=generator), inputs, inputs.T @ inputs / len(inputs)


def test_the_parts_of_the_channels_add_up_to_the_output_error() -> None:
    difference, inputs, gram = random_case()

    parts = channel_errors([difference], gram)

    outputs = inputs @ difference.T
    assert float(parts.sum()) == pytest.approx(float(outputs.square().sum()) / len(inputs), rel=1e-5)
    assert float(parts.sum()) == pytest.approx(float(output_error(difference, gram).sum()), rel=1e-5)


def test_of_inputs_that_are_independent_each_channel_carries_its_own_error() -> None:
    # given two channels, the second of twice the size: four times the energy
    difference = torch.tensor([[1.0, 0.0], [2.0, 3.0]])
    gram = torch.tensor([[1.0, 0.0], [0.0, 4.0]])

    assert channel_errors([difference], gram).tolist() == [1 + 4, 4 * 9]


def test_a_folded_scale_changes_no_channels_part() -> None:
    difference, _, gram = random_case()
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])

    folded = channel_errors([difference * scale], gram / (scale[:, None] * scale[None, :]))

    assert torch.allclose(folded, channel_errors([difference], gram), rtol=1e-5)


def test_channels_are_picked_by_magnitude_and_beside_that_by_the_norm_of_their_weights() -> None:
    # given 200 channels of an error of 1 each, of which 7 and 3 carry the most and have 50 each, and 9 and 11 have the
    # largest weights
    mean_magnitude, weight_norm, plain_errors = torch.ones(200), torch.ones(200), torch.ones(200)
    mean_magnitude[7], mean_magnitude[3] = 9.0, 8.0
    weight_norm[9], weight_norm[11] = 9.0, 8.0
    plain_errors[[3, 7]] = 50.0
    # and a method that leaves a fifth of the error of those two, and all of the others'
    chosen_errors = plain_errors.clone()
    chosen_errors[[3, 7]] = 10.0

    salience = measure_salience(LinearChannels(mean_magnitude, weight_norm, plain_errors), chosen_errors)

    total = 198 + 2 * 50
    assert salience.channels == (7, 3)
    assert salience.by_magnitude == ChannelErrors(pytest.approx(100 / total), pytest.approx(20 / total))
    assert salience.by_weight == ChannelErrors(pytest.approx(2 / total), pytest.approx(2 / total))


def test_a_small_linear_has_one_salient_channel() -> None:
    channels = LinearChannels(torch.tensor([1.0, 3.0, 2.0]), torch.ones(3), torch.ones(3))

    assert measure_salience(channels, torch.ones(3)).channels == (1,)


def test_a_linear_that_loses_nothing_has_no_error_to_share() -> None:
    weight = torch.ones(2, 3)

    channels = describe_channels(weight, [weight - weight], torch.eye(3), torch.ones(3))

    assert measure_salience(channels, torch.zeros(3)).by_magnitude == ChannelErrors(0.0, 0.0)


def test_what_is_known_of_a_linear_comes_from_its_weights_and_its_input() -> None:
    weight, plain = torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.tensor([[2.0, 1.0], [4.0, 0.0]])

    channels = describe_channels(weight, [weight - plain], 2 * torch.eye(2), torch.tensor([0.5, 1.5]))

    assert channels.mean_magnitude.tolist() == [0.5, 1.5]
    assert channels.weight_norm.tolist() == [5.0, 1.0]
    assert channels.plain_errors.tolist() == [2.0, 0.0]
