"""Correction: weights that give with the quantized model's inputs what the original gave with its own."""

import torch
from torch import Tensor

from quant.correction import SplitMoments, TargetSums, correct_
from quant.device import HOST
from quant.gram_sums import SplitGramSum

NUM_FEATURES, NUM_OUTPUTS = 24, 8
NAME = "linear"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def split_moments(original: Tensor, current: Tensor, target: Tensor | None = None) -> SplitMoments:
    """target: what the linear called NAME should give, where it adds to the stream."""
    half = len(original) // 2
    grams = SplitGramSum(current.shape[1], HOST)
    grams.add_fit(current[:half], current[:half])
    grams.add_held_out(current[half:], current[half:])
    whole, held_out = (
        TargetSums(
            cross=original[tokens].T @ current[tokens],
            targets={} if target is None else {NAME: target[tokens].T @ current[tokens]},
        )
        for tokens in (slice(None), slice(half, None))
    )
    return SplitMoments(grams, whole, held_out)


def corrected_of(weight: Tensor, moments: SplitMoments, name: str = NAME) -> Tensor:
    corrected = weight.clone()
    correct_({name: corrected}, moments)
    return corrected


def test_a_linear_change_of_the_inputs_is_taken_back() -> None:
    # given inputs that come out mixed
    original = noise(2000, NUM_FEATURES, seed=0)
    current = original @ (torch.eye(NUM_FEATURES) + 0.1 * noise(NUM_FEATURES, NUM_FEATURES, seed=1))
    weight = noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)

    corrected = corrected_of(weight, split_moments(original, current))

    before = (original @ weight.T - current @ weight.T).square().mean()
    after = (original @ weight.T - current @ corrected.T).square().mean()
    assert after < 0.01 * before


def test_the_drift_of_the_stream_is_made_up_for() -> None:
    # given a stream that has drifted by something that the inputs tell
    inputs = noise(2000, NUM_FEATURES, seed=0)
    drift = inputs @ noise(NUM_FEATURES, NUM_OUTPUTS, seed=1)
    weight = noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)

    corrected = corrected_of(weight, split_moments(inputs, inputs, inputs @ weight.T + drift))

    remaining = inputs @ weight.T + drift - inputs @ corrected.T
    assert remaining.square().mean() < 0.01 * drift.square().mean()


def test_what_does_not_carry_over_to_held_out_text_is_left_alone() -> None:
    # given a drift that has nothing to do with the inputs, and few tokens to find that out from
    inputs = noise(60, NUM_FEATURES, seed=0)
    drift = 3 * noise(60, NUM_OUTPUTS, seed=1)
    weight = noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)

    corrected = corrected_of(weight, split_moments(inputs, inputs, inputs @ weight.T + drift))

    # plain least squares moves them by more than 0.5
    assert (corrected - weight).square().mean().sqrt() < 0.2


def test_equal_inputs_change_no_weight() -> None:
    inputs = noise(100, NUM_FEATURES, seed=0)
    weight = noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)
    torch.testing.assert_close(corrected_of(weight, split_moments(inputs, inputs)), weight)


def test_dead_inputs_and_no_tokens_leave_finite_weights() -> None:
    inputs = noise(50, NUM_FEATURES, seed=0)
    inputs[:, 3] = 0
    weight = noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)
    assert torch.isfinite(corrected_of(weight, split_moments(inputs, inputs * 1.1))).all()
    assert torch.equal(corrected_of(weight, split_moments(inputs[:0], inputs[:0])), weight)


def test_linears_that_read_one_input_are_corrected_as_each_would_be_alone() -> None:
    # given one of them that adds to a drifting stream, and more rows than ridges are ranked on
    original = noise(400, NUM_FEATURES, seed=0)
    current = original + 0.3 * noise(400, NUM_FEATURES, seed=1)
    drift = current @ noise(NUM_FEATURES, NUM_OUTPUTS, seed=2)
    weights = {NAME: noise(NUM_OUTPUTS, NUM_FEATURES, seed=3), "wide": 100 * noise(600, NUM_FEATURES, seed=4)}
    target = original @ weights[NAME].T + drift
    together = {name: weight.clone() for name, weight in weights.items()}

    correct_(together, split_moments(original, current, target))

    for name, weight in weights.items():
        alone = corrected_of(weight, split_moments(original, current, target), name)
        assert not torch.equal(alone, weight)
        torch.testing.assert_close(together[name], alone)


def test_all_tokens_are_summed_up_for_whoever_rounds_afterwards() -> None:
    inputs = noise(100, NUM_FEATURES, seed=0)
    gram = correct_({NAME: noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)}, split_moments(inputs, inputs))
    torch.testing.assert_close(gram, inputs.T @ inputs)


def test_sums_too_rough_to_be_solved_leave_the_weight_alone() -> None:
    # given products that were rounded before they were summed, so that the gram is no longer positive definite
    inputs = noise(40, NUM_FEATURES, seed=0)
    rough = 1000 * (torch.ones(NUM_FEATURES, NUM_FEATURES) - torch.eye(NUM_FEATURES))
    moments = split_moments(torch.cat([inputs, inputs]), torch.cat([inputs, inputs]))
    moments.grams.add_fit(rough, torch.eye(NUM_FEATURES))
    moments.grams.add_held_out(rough, torch.eye(NUM_FEATURES))
    weight = noise(NUM_OUTPUTS, NUM_FEATURES, seed=2)

    corrected = corrected_of(weight, moments)

    assert torch.equal(corrected, weight)
