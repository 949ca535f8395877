import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.counter_random import uniform
from server.engine.logit_edits import edit_logits
from server.engine.random_draw import draw, row_argmax
from server.engine.request import SamplingParams
from server.engine.sampler import NOT_FINITE, sample
from server.engine.step_plan import SamplingRow
from server.engine.truncation import truncate

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
RANDOM = SamplingParams(max_tokens=8, temperature=1.0)


def row(params: SamplingParams, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = ()) -> SamplingRow:
    text = np.array(prompt + output, dtype=np.int64)
    return SamplingRow("r", 0, params, text, len(text), len(prompt))


def random_logits(num_rows: int, vocab_size: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, vocab_size, generator=generator) * spread


def support(probs: torch.Tensor) -> set[int]:
    return set(probs.nonzero()[:, 0].tolist())


class TestGreedy:
    @pytest.mark.parametrize("vocab_size", [1, 7, 256, 1000, 49152])
    def test_takes_the_first_of_the_largest_logits(self, vocab_size: int) -> None:
        logits = random_logits(3, vocab_size).round()
        ids, peaks = row_argmax(logits)
        for index in range(3):
            best = logits[index].max()
            assert peaks[index] == best
            assert ids[index] == (logits[index] == best).nonzero()[0, 0]

    def test_a_temperature_too_small_to_divide_by_is_greedy(self) -> None:
        logits = random_logits(1, 100)
        assert sample(logits, [row(replace(RANDOM, temperature=1e-9))]) == sample(logits, [row(GREEDY)])

    def test_leaves_the_logits_as_they_were(self) -> None:
        logits = random_logits(2, 50)
        before = logits.clone()
        params = replace(GREEDY, repetition_penalty=2.0, logit_bias=((3, 5.0),), min_tokens=4, stop_token_ids=(7,))
        sample(logits, [row(params), row(replace(params, temperature=1.0))])
        assert torch.equal(logits, before)


class TestEdits:
    def test_penalties_follow_the_worked_example(self) -> None:
        # given logits of ids 0..4, prompt (1, 2), output (2, 3, 3)
        logits = torch.tensor([[1.0, 2.0, -2.0, 4.0, 3.0]])
        params = replace(GREEDY, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
        # then 1: prompt only, 2/2 = 1. 2: -2*2 = -4, once in the output: -4 - 0.5 - 0.25. 3: 4/2 = 2 - 0.5 - 2*0.25
        edited = edit_logits(logits, [row(params, (1, 2), (2, 3, 3))])
        assert edited.tolist() == [[1.0, 1.0, -4.75, 1.0, 3.0]]

    def test_each_row_has_its_own_penalties(self) -> None:
        logits = torch.tensor([[2.0, 2.0]] * 3)
        rows = [
            row(replace(GREEDY, repetition_penalty=2.0), (0,)),
            row(GREEDY, (0,)),
            row(replace(GREEDY, presence_penalty=1.0), (0,), (1,)),
        ]
        assert edit_logits(logits, rows).tolist() == [[1.0, 2.0], [2.0, 2.0], [2.0, 1.0]]

    def test_bias_is_added_before_the_penalty(self) -> None:
        params = replace(GREEDY, logit_bias=((0, 3.0), (4, -100.0)), repetition_penalty=2.0)
        edited = edit_logits(torch.tensor([[1.0, 0.0, 0.0, 0.0, 9.0]]), [row(params, (0,))])
        assert edited.tolist() == [[2.0, 0.0, 0.0, 0.0, -91.0]]

    def test_stop_tokens_are_barred_until_min_tokens_are_out(self) -> None:
        params = replace(GREEDY, stop_token_ids=(3,), min_tokens=2, logit_bias=((3, 100.0),))
        logits = torch.tensor([[0.0, 1.0, 0.0, 5.0]])
        drawn = [sample(logits, [row(params, (0,), (1,) * num_output)])[0].token_id for num_output in range(4)]
        assert drawn == [1, 1, 3, 3]


class TestTruncation:
    def test_top_k_keeps_the_k_likeliest(self) -> None:
        probs = random_logits(1, 500).softmax(-1)
        kept = truncate(probs, [replace(RANDOM, top_k=7)])[0]
        assert support(kept) == set(probs[0].topk(7).indices.tolist())

    def test_top_p_keeps_the_fewest_tokens_that_reach_p(self) -> None:
        probs = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]])
        assert support(truncate(probs, [replace(RANDOM, top_p=0.6)])[0]) == {1, 3}
        assert support(truncate(probs, [replace(RANDOM, top_p=0.7)])[0]) == {1, 3, 2}
        assert support(truncate(probs, [replace(RANDOM, top_p=1e-6)])[0]) == {1}

    def test_top_p_counts_within_what_top_k_left(self) -> None:
        probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
        # of 0.4 and 0.3, the first alone is 0.57 of the mass
        assert support(truncate(probs, [replace(RANDOM, top_k=2, top_p=0.55)])[0]) == {0}
        assert support(truncate(probs, [replace(RANDOM, top_k=2, top_p=0.6)])[0]) == {0, 1}

    def test_min_p_is_relative_to_the_likeliest(self) -> None:
        probs = torch.tensor([[0.5, 0.3, 0.12, 0.08]])
        assert support(truncate(probs, [replace(RANDOM, min_p=0.24)])[0]) == {0, 1, 2}

    def test_a_flat_distribution_needs_more_than_the_first_candidates(self) -> None:
        probs = random_logits(1, 5000, spread=0.01).softmax(-1)
        kept = truncate(probs, [replace(RANDOM, top_p=0.9)])[0]
        assert kept.sum() >= 0.9
        assert kept.sum() - kept[kept > 0].min() < 0.9
        assert kept[kept > 0].min() >= probs[0][kept == 0].max()

    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 10_000),
        spread=st.sampled_from([0.1, 1.0, 5.0]),
        top_k=st.sampled_from([0, 1, 3, 200, 400]),
        top_p=st.sampled_from([0.01, 0.5, 0.95, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 0.5]),
    )
    def test_agrees_with_the_definition_token_by_token(
        self, seed: int, spread: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        probs = random_logits(1, 300, seed, spread).softmax(-1)
        kept = support(truncate(probs, [replace(RANDOM, top_k=top_k, top_p=top_p, min_p=min_p)])[0])
        ranked = sorted(enumerate(probs[0].double().tolist()), key=lambda pair: -pair[1])
        ranked = ranked[: top_k or None]
        total, mass, expected = sum(p for _, p in ranked) if top_k else 1.0, 0.0, set()
        for token, p in ranked:
            if (top_p == 1 or mass < top_p * total) and p >= min_p * ranked[0][1]:
                expected.add(token)
            mass += p
        # where rounding decides, one token at the border may differ
        assert len(kept ^ expected) <= 1

    def test_rows_do_not_disturb_one_another(self) -> None:
        probs = random_logits(4, 3000, spread=2.0).softmax(-1)
        params = [replace(RANDOM, top_p=0.99), RANDOM, replace(RANDOM, top_k=5), replace(RANDOM, min_p=0.1)]
        together = truncate(probs, params)
        for index, one in enumerate(params):
            assert torch.equal(together[index], truncate(probs[index : index + 1], [one])[0])


class TestDraws:
    @pytest.mark.parametrize("vocab_size", [6, 256, 1536, 1009])
    def test_follow_the_distribution(self, vocab_size: int) -> None:
        probs = random_logits(1, vocab_size, seed=3, spread=2.0).softmax(-1)
        num_draws = 20_000
        uniforms = torch.tensor([uniform(11, position) for position in range(num_draws)], dtype=torch.float64)
        counts = torch.bincount(draw(probs.expand(num_draws, -1).contiguous(), uniforms), minlength=vocab_size)
        # chi-square over the tokens with at least 5 expected draws, the rest pooled into one cell
        expected = probs[0].double() * num_draws
        common = expected >= 5
        observed_cells = torch.cat((counts[common].double(), counts[~common].sum()[None].double()))
        expected_cells = torch.cat((expected[common], expected[~common].sum()[None]))
        full = expected_cells > 1e-9
        chi_square = float(((observed_cells - expected_cells)[full] ** 2 / expected_cells[full]).sum())
        freedom = int(full.sum()) - 1
        # mean f, variance 2f: five standard deviations
        assert chi_square < freedom + 5 * math.sqrt(2 * freedom)

    def test_never_give_a_token_of_probability_zero(self) -> None:
        probs = torch.zeros(4, 512)
        probs[:, [0, 300, 511]] = torch.tensor([1e-6, 0.3, 1e-30])
        edges = torch.tensor([0.0, 1e-17, 0.5, 1 - 2.0**-52], dtype=torch.float64)
        assert set(draw(probs, edges).tolist()) <= {0, 300, 511}

    def test_uniform_numbers_of_neighbouring_keys_are_unrelated(self) -> None:
        grid = np.array([[uniform(seed, position) for position in range(64)] for seed in range(-32, 32)])
        assert len(np.unique(grid)) == grid.size
        assert grid.min() >= 0
        assert grid.max() < 1
        assert abs(grid.mean() - 0.5) < 0.02
        for axis in (0, 1):
            neighbours = np.corrcoef(np.roll(grid, 1, axis).ravel(), grid.ravel())[0, 1]
            assert abs(neighbours) < 0.06

    def test_a_seeded_row_draws_the_same_whatever_its_batch(self) -> None:
        logits = random_logits(1, 1500)
        mates = [
            GREEDY,
            RANDOM,
            replace(RANDOM, top_p=0.9, seed=5),
            replace(RANDOM, top_k=3),
            replace(RANDOM, repetition_penalty=1.5, temperature=0.3),
        ]
        for params in (replace(RANDOM, seed=42), replace(RANDOM, seed=42, top_p=0.8, temperature=1.4)):
            for num_output in range(5):
                target = row(params, (1, 2), tuple(range(num_output)))
                alone = sample(logits, [target])[0].token_id
                for place in range(len(mates) + 1):
                    rows = [row(mate) for mate in mates]
                    rows.insert(place, target)
                    batch = random_logits(len(rows), 1500, seed=9)
                    batch[place] = logits[0]
                    assert sample(batch, rows)[place].token_id == alone

    def test_other_seeds_and_other_positions_draw_otherwise(self) -> None:
        logits = torch.zeros(1, 4096)
        by_seed = {sample(logits, [row(replace(RANDOM, seed=seed))])[0].token_id for seed in range(20)}
        by_position = {sample(logits, [row(RANDOM, (1,), (2,) * n)])[0].token_id for n in range(20)}
        assert len(by_seed) > 15
        assert len(by_position) > 15

    def test_a_low_temperature_sharpens(self) -> None:
        logits = torch.tensor([[1.0, 0.0]])
        cold = Counter(sample(logits, [row(replace(RANDOM, temperature=0.1, seed=s))])[0].token_id for s in range(300))
        warm = Counter(sample(logits, [row(replace(RANDOM, temperature=5.0, seed=s))])[0].token_id for s in range(300))
        assert cold[1] < 10 < 80 < warm[1]


class TestFiniteness:
    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    @pytest.mark.parametrize("params", [GREEDY, replace(RANDOM, top_p=0.9, logprobs=2)])
    def test_a_poisoned_row_fails_alone(self, poison: float, params: SamplingParams) -> None:
        logits = random_logits(3, 700)
        clean = sample(logits[[0, 2]], [row(params), row(params)])
        logits[1, 350] = poison
        sampled = sample(logits, [row(params)] * 3)
        assert sampled[1].error == NOT_FINITE
        assert (sampled[0], sampled[2]) == clean

    def test_a_row_without_any_possible_token_fails(self) -> None:
        assert sample(torch.full((1, 9), float("-inf")), [row(RANDOM)])[0].error == NOT_FINITE


class TestLogprobs:
    def test_are_those_of_the_model_whatever_the_sampling_does(self) -> None:
        logits = random_logits(1, 300)
        params = replace(GREEDY, logprobs=3, logit_bias=((5, 100.0),))
        sampled = sample(logits, [row(params)])[0]
        expected = logits.log_softmax(-1)[0]
        assert sampled.token_id == 5
        assert sampled.logprob is not None
        assert sampled.logprob.logprob == expected[5]
        assert [token for token, _ in sampled.logprob.top] == expected.topk(3).indices.tolist()
        assert [value for _, value in sampled.logprob.top] == expected.topk(3).values.tolist()

    def test_the_chosen_token_has_the_same_number_in_the_list(self) -> None:
        sampled = sample(random_logits(1, 300), [row(replace(GREEDY, logprobs=1))])[0]
        assert sampled.logprob is not None
        assert sampled.logprob.top == ((sampled.token_id, sampled.logprob.logprob),)

    def test_each_row_gets_as_many_as_it_asked_for(self) -> None:
        rows = [row(replace(GREEDY, logprobs=count)) for count in (0, None, 4)]
        first, second, third = sample(random_logits(3, 300), rows)
        assert first.logprob is not None
        assert first.logprob.top == ()
        assert second.logprob is None
        assert third.logprob is not None
        assert len(third.logprob.top) == 4
