"""The tokens that the sampling kernels choose are those that the CPU serves, whatever a row asks for."""

from dataclasses import replace

import numpy as np
import torch

from kernels.dispatch import runs_triton
from kernels.sampling_batch import NO_TOKEN
from server.engine.device_sampling import build_batch, choose_tokens
from server.engine.request import SamplingParams
from server.engine.sampler import sample
from server.engine.step_plan import SamplingRow
from tests.kernels.launches import DEVICE
from tests.server.engine.automaton import bits

VOCAB_SIZE = 1000
PLAIN = SamplingParams(max_tokens=99)
EVERYTHING = replace(
    PLAIN,
    repetition_penalty=1.3,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    logit_bias=((7, 4.0), (8, -3.0)),
    stop_token_ids=(9, 7),
    min_tokens=5,
)
CHOICES = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
)


def row(params: SamplingParams, prompt: tuple[int, ...] = (3, 5, 5, 700), output: tuple[int, ...] = ()) -> SamplingRow:
    text = np.array(prompt + output, dtype=np.int64)
    return SamplingRow("r", 0, params, text, len(text), len(prompt))


def random_logits(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


def test_the_token_is_the_one_that_the_cpu_serves() -> None:
    # given rows of all kinds in one batch, with seeds from the ends of 64 bits too
    assert not runs_triton(torch.device("cpu"))
    seeds = (0, 1, -(2**63), 2**63 - 1)
    rows = [
        row(replace(params, seed=seed, **choice), output=output)
        for choice in CHOICES
        for seed, (params, output) in zip(
            seeds, ((PLAIN, ()), (EVERYTHING, ()), (EVERYTHING, (7, 7, 5, 999)), (PLAIN, (1,))), strict=True
        )
    ]
    logits = random_logits(len(rows))

    tokens = choose_tokens(logits.to(DEVICE), rows).tolist()

    assert tokens == [token.token_id for token in sample(logits, rows)]


def test_stop_tokens_are_barred_until_min_tokens_are_out() -> None:
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[:, 9] = 50.0
    logits[:, 3] = 1.0
    params = replace(PLAIN, temperature=0.0, stop_token_ids=(9,), min_tokens=2, logit_bias=((9, 100.0),))

    tokens = choose_tokens(logits.to(DEVICE), [row(params, output=(1,) * count) for count in range(4)]).tolist()

    assert tokens == [3, 3, 9, 9]


def test_a_poisoned_row_fails_alone() -> None:
    logits = random_logits(3)
    rows = [row(replace(PLAIN, seed=seed)) for seed in range(3)]
    clean = choose_tokens(logits.to(DEVICE), rows).tolist()
    logits[1, 350] = float("nan")

    assert choose_tokens(logits.to(DEVICE), rows).tolist() == [clean[0], NO_TOKEN, clean[2]]


def test_a_mask_allows_the_tokens_that_it_allows_on_the_cpu() -> None:
    # given rows with a mask beside rows with none, greedy and drawn
    rows = [row(replace(PLAIN, seed=seed, **choice)) for seed, choice in enumerate((*CHOICES, *CHOICES))]
    rows = [one._replace(allowed=bits(range(3, 1000, 97))) if index % 3 else one for index, one in enumerate(rows)]
    logits = random_logits(len(rows))

    tokens = choose_tokens(logits.to(DEVICE), rows).tolist()

    assert tokens == [token.token_id for token in sample(logits, rows)]
    assert all(token in range(3, 1000, 97) for index, token in enumerate(tokens) if index % 3)


def test_what_no_row_asks_for_is_left_out() -> None:
    plain, edited = build_batch([row(PLAIN)], DEVICE), build_batch([row(PLAIN), row(EVERYTHING)], DEVICE)

    assert plain.penalties is None
    assert plain.bias is None
    assert plain.allowed is None
    # a row without penalties brings no text
    assert edited.penalties is not None
    assert edited.penalties.starts.tolist() == [0, 0, 4]
    assert edited.bias is not None
    assert edited.bias.starts.tolist() == [0, 0, 4]
