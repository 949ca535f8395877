"""Gram sums: what is multiplied once and kept once is what the definition gives."""

import pytest
import torch
from torch import Tensor

from quant import gram_sums
from quant.device import HOST
from quant.gram_sums import GramSum, SplitGramSum

# no multiple of the number of panels
NUM_FEATURES = 50


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weighted_gram(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.T @ (rows * weights[:, None])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # float32, of sums of up to a few thousand
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


@pytest.fixture(params=[7, 1024], ids=["many panels", "three panels"])
def _panels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_sums, "WIDEST_PANEL", request.param)


@pytest.mark.usefixtures("_panels")
def test_a_sum_over_chunks_is_that_over_all_tokens() -> None:
    rows, weights = noise(90, NUM_FEATURES, seed=0), torch.rand(90, generator=torch.Generator().manual_seed(1))
    total = GramSum(NUM_FEATURES, HOST)
    for chunk, own in zip(rows.split(40), weights.split(40), strict=True):
        total.add(chunk * own[:, None], chunk)
    result = total.result()
    torch.testing.assert_close(result, weighted_gram(rows, weights))
    assert torch.equal(result, result.T)


@pytest.mark.usefixtures("_panels")
def test_two_parts_in_one_matrix_stay_apart() -> None:
    # given parts of which neither can be told from the other's sum
    fit, held_out = noise(90, NUM_FEATURES, seed=0), 10 * noise(30, NUM_FEATURES, seed=1)
    weights, rows = torch.rand(90, generator=torch.Generator().manual_seed(2)), noise(4, NUM_FEATURES, seed=3)
    sums = SplitGramSum(NUM_FEATURES, HOST)
    for first, own in zip(fit.split(40), weights.split(40), strict=True):
        sums.add_fit(first * own[:, None], first)
        sums.add_held_out(held_out[:10], held_out[:10])
    expected_fit, expected_held_out = weighted_gram(fit, weights), 3 * held_out[:10].T @ held_out[:10]

    assert_close(sums.fit(), expected_fit)
    assert_close(sums.held_out_product(rows), rows @ expected_held_out)
    assert_close(sums.total(), expected_fit + expected_held_out)
    # asked in any order, they are as they were
    assert_close(sums.fit(), expected_fit)
    assert_close(sums.merge(), expected_fit + expected_held_out)


@pytest.mark.usefixtures("_panels")
def test_a_scale_is_that_of_the_inputs() -> None:
    fit, held_out = noise(90, NUM_FEATURES, seed=0), noise(30, NUM_FEATURES, seed=1)
    scale = torch.linspace(0.5, 2.0, NUM_FEATURES)
    sums, scaled = SplitGramSum(NUM_FEATURES, HOST), SplitGramSum(NUM_FEATURES, HOST)
    sums.add_fit(fit, fit)
    sums.add_held_out(held_out, held_out)
    scaled.add_fit(fit * scale, fit * scale)
    scaled.add_held_out(held_out * scale, held_out * scale)

    sums.scale_(scale)

    eye = torch.eye(NUM_FEATURES)
    assert_close(sums.fit(), scaled.fit())
    assert_close(sums.held_out_product(eye), scaled.held_out_product(eye))
