"""Tokens chosen on the device against the plain definition: thresholds, ties, draws, rows that are not finite."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_sampling
from kernels.counter_random import uniform
from kernels.fused_sampling import sample
from kernels.sampling_batch import NO_TOKEN
from tests.kernels.launches import DEVICE, fresh_memory_is_nan
from tests.kernels.sampling_rows import Row, build_batch, on_device


def run(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    batch = on_device(build_batch(rows, logits.shape[1]))
    with fresh_memory_is_nan():
        tokens: list[int] = sample(logits.to(DEVICE), batch).tolist()
    return tokens


def random_logits(num_rows: int, vocab_size: int, *, seed: int = 0, spread: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


# seeds whose numbers at position 0 are about 1/16, 3/16, ... 15/16: a token of an eighth of the mass is drawn
SPREAD_SEEDS = [min(range(200), key=lambda seed: abs(uniform(seed, 0) - (step + 0.5) / 8)) for step in range(8)]


def drawn_set(logits: Sequence[float], row: Row) -> set[int]:
    """The tokens that rows of these logits give under seeds that are spread over all numbers."""
    rows = [dataclasses.replace(row, seed=seed) for seed in SPREAD_SEEDS]
    return set(run(torch.tensor([list(logits)] * len(rows)), rows))


any_row = st.builds(
    Row,
    temperature=st.sampled_from([0.0, 1e-6, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 50, 300, 400]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
)


# a fixed list of examples: where a number falls within rounding of a border, both neighbours would be right
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    rows=st.lists(any_row, min_size=1, max_size=4),
    vocab_size=st.sampled_from([1, 2, 300, 1009]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    digits=st.sampled_from([0, 6]),
)
def test_any_row_gets_the_token_of_the_definition(rows: list[Row], vocab_size: int, spread: float, digits: int) -> None:
    # with no digits many logits tie
    logits = random_logits(len(rows), vocab_size, spread=spread).round(decimals=digits)

    assert run(logits, rows) == reference_sampling.sample(logits, build_batch(rows, vocab_size)).tolist()


@pytest.mark.parametrize("vocab_size", [4096, 9001])
def test_a_vocabulary_of_several_tiles(vocab_size: int) -> None:
    logits = random_logits(4, vocab_size, seed=4)
    rows = [Row(temperature=0.0), Row(seed=1), Row(seed=2, top_k=5), Row(seed=3, top_p=0.7)]

    assert run(logits, rows) == reference_sampling.sample(logits, build_batch(rows, vocab_size)).tolist()


def test_the_random_number_is_that_of_seed_and_position() -> None:
    # given 2**12 tokens that are all as likely: the token is the first 12 bits of the number
    rows = [Row(seed=seed, position=position) for seed in (-(2**63), -1, 0, 2**63 - 1) for position in (0, 1, 2**40)]

    tokens = run(torch.zeros(len(rows), 4096), rows)

    assert tokens == [int(uniform(row.seed, row.position) * 4096) for row in rows]


class TestThresholds:
    def test_tokens_that_tie_with_the_last_one_kept_are_kept(self) -> None:
        logits = [0.0, 2.0, 1.0, 1.0, 1.0, -9.0]

        assert drawn_set(logits, Row(top_k=2)) == {1, 2, 3, 4}
        # e / (e + 2) of top-k's mass is 0.73 with one of the ties, whatever their number
        assert drawn_set(logits, Row(top_k=2, top_p=0.73)) == {1}
        assert drawn_set(logits, Row(top_k=2, top_p=0.74)) == {1, 2, 3, 4}

    def test_zero_ties_with_minus_zero(self) -> None:
        assert drawn_set([0.0, -0.0, -1.0], Row(top_k=1)) == {0, 1}
        assert run(torch.tensor([[-1.0, -0.0, 0.0]]), [Row(temperature=0.0)]) == [1]

    def test_a_hair_between_two_logits_decides(self) -> None:
        above_one = float(np.nextafter(np.float32(1), np.float32(2)))

        assert drawn_set([1.0, above_one, 1.0], Row(top_k=1)) == {1}

    def test_fewer_possible_tokens_than_top_k(self) -> None:
        assert drawn_set([float("-inf"), 1.0, 1.0, float("-inf")], Row(top_k=3)) == {1, 2}

    def test_min_p_is_relative_to_the_likeliest(self) -> None:
        logits = torch.tensor([0.5, 0.3, 0.12, 0.08]).log().tolist()

        assert drawn_set(logits, Row(min_p=0.23)) == {0, 1, 2}
        assert drawn_set(logits, Row(min_p=1.0)) == {0}

    def test_the_largest_and_the_smallest_numbers(self) -> None:
        largest = torch.finfo(torch.float32).max

        assert drawn_set([-largest, largest, largest], Row(top_p=0.99)) == {1, 2}
        assert drawn_set([1e-40, 0.0, -1e-40], Row(top_k=1)) == {0}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_token_and_disturbs_no_other(poison: float) -> None:
    logits = random_logits(3, 500)
    rows = [Row(temperature=0.0), Row(top_p=0.9, seed=1), Row(top_k=9, seed=2)]
    clean = run(logits, rows)

    for index in range(3):
        poisoned = logits.clone()
        poisoned[index, 123] = poison
        assert run(poisoned, rows) == [NO_TOKEN if other == index else clean[other] for other in range(3)]


def test_a_row_without_any_possible_token_has_none() -> None:
    logits = torch.zeros(3, 40)
    logits[0] = float("-inf")

    assert run(logits, [Row(), Row(allowed=[]), Row(allowed=[33])]) == [NO_TOKEN, NO_TOKEN, 33]


def test_a_row_draws_the_same_whatever_its_batch() -> None:
    logits = random_logits(5, 700, seed=8)
    rows = [
        Row(seed=1, top_p=0.9, bias={3: 2.0}),
        Row(temperature=0.0, repetition=1.5, prompt=[1, 2], output=[5]),
        Row(seed=2, top_k=7, allowed=range(100)),
        Row(seed=3),
        Row(seed=4, min_p=0.1, frequency=0.5, output=[9, 9]),
    ]
    together = run(logits, rows)

    assert [run(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)] == together
    assert run(logits.flip(0), rows[::-1]) == together[::-1]


def test_no_rows_are_no_launch() -> None:
    assert run(torch.empty(0, 9), []) == []


def test_operands_that_do_not_fit_are_refused() -> None:
    logits = torch.zeros(2, 40)
    batch = build_batch([Row(), Row(bias={1: 1.0}, allowed=[1], presence=1.0, output=[1])], 40)
    assert batch.bias is not None
    assert batch.penalties is not None

    with pytest.raises(ValueError, match=r"logits must be float32 \[S, V\]"):
        sample(logits.half(), batch)
    with pytest.raises(ValueError, match=r"temperatures must be contiguous torch\.float32 \[3\]"):
        sample(torch.zeros(3, 40), batch)
    with pytest.raises(ValueError, match=r"allowed must be contiguous torch\.int32 \[2, 3\]"):
        sample(torch.zeros(2, 70), batch)
    with pytest.raises(ValueError, match=r"top_p must be contiguous torch\.float64"):
        sample(logits, dataclasses.replace(batch, top_p=batch.top_p.float()))
    with pytest.raises(ValueError, match=r"bias values must be contiguous torch\.float32 \[1\]"):
        sample(logits, dataclasses.replace(batch, bias=dataclasses.replace(batch.bias, values=torch.zeros(2))))
    short = dataclasses.replace(batch.penalties, token_ids=batch.penalties.token_ids.int())
    with pytest.raises(ValueError, match=r"penalized token_ids must be contiguous torch\.int64 \[any\]"):
        sample(logits, dataclasses.replace(batch, penalties=short))
