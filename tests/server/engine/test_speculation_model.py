"""Guesses change neither tokens nor logprobs of a real decoder; with the native kernels, not by a bit."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.errors import EngineSetupError
from server.engine.request import GenerationRequest, SamplingParams
from tests.server.engine.served import Served, config, quantized_model

PROMPT = (5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6)
GREEDY = SamplingParams(max_tokens=60, temperature=0.0)
# a few tokens are so likely that some guesses come true, and most do not
SEEDED = SamplingParams(max_tokens=60, temperature=1.0, seed=3, logit_bias=((5, 12.0), (6, 12.0), (7, 11.0)))
CASES = {
    "greedy": GREEDY,
    "greedy with logprobs": replace(GREEDY, logprobs=3, prompt_logprobs=2),
    "greedy with penalties": replace(GREEDY, repetition_penalty=1.1, frequency_penalty=0.02, presence_penalty=0.1),
    "seeded": SEEDED,
    "seeded, of few": replace(SEEDED, top_p=0.9, top_k=4, min_p=0.01, logprobs=0),
    "seeded with penalties": replace(SEEDED, repetition_penalty=1.2, frequency_penalty=0.2, logprobs=2),
    "seeded with a stop token": replace(SEEDED, stop_token_ids=(7,), min_tokens=30),
    "few tokens": replace(GREEDY, max_tokens=3),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_model(tmp_path_factory.mktemp("quantized"))


def test_the_native_kernels_give_each_request_the_bits_it_gets_without_guesses(quantized: Path) -> None:
    requests = [GenerationRequest(name, PROMPT, params) for name, params in CASES.items()]
    guessing, plain = Served(config(quantized, 6), *requests), Served(config(quantized, 0), *requests)
    assert guessing.info.kernels.startswith("native")
    assert guessing.num_accepted > 0
    assert plain.num_accepted == 0
    for name in CASES:
        assert guessing.answer(name) == plain.answer(name), name


@pytest.mark.parametrize("name", ["greedy with logprobs", "seeded with penalties", "seeded with a stop token"])
def test_alone_a_request_guesses_more_and_gets_the_same(quantized: Path, name: str) -> None:
    one = GenerationRequest(name, PROMPT, CASES[name])
    guessing = Served(config(quantized, 6), one)
    assert guessing.num_accepted > 0
    assert guessing.answer(name) == Served(config(quantized, 0), one).answer(name)


def test_preempted_requests_get_the_same_too(quantized: Path) -> None:
    requests = [GenerationRequest(name, PROMPT, params) for name, params in CASES.items()]
    roomy = config(quantized, 6)
    # given a cache of 144 tokens for requests that grow to 600 together
    tight = replace(roomy, kv_cache_bytes=144 * 2 * 2 * 2 * 16 * 2, max_model_len=128)
    guessing = Served(tight, *requests)
    assert guessing.stats is not None
    assert guessing.stats.num_preemptions > 0
    assert guessing.num_accepted > 0
    plain = Served(config(quantized, 0), *requests)
    for name in CASES:
        assert guessing.answer(name) == plain.answer(name), name


def test_with_deterministic_too_where_the_kernels_are_native(quantized: Path) -> None:
    one = GenerationRequest("r", PROMPT, SEEDED)
    guessing = Served(replace(config(quantized, 6), deterministic=True), one)
    assert guessing.num_accepted > 0
    assert guessing.answer("r") == Served(config(quantized, 0), one).answer("r")


def test_with_deterministic_other_kernels_are_refused(tiny_model: Path) -> None:
    both = replace(config(tiny_model, 6), deterministic=True)
    with pytest.raises(EngineSetupError, match="deterministic is set and num_speculative_tokens is 6"):
        Served(both)


def test_torch_gives_the_same_tokens(tiny_model: Path) -> None:
    requests = [GenerationRequest(name, PROMPT, params) for name, params in CASES.items()]
    guessing, plain = Served(config(tiny_model, 6), *requests), Served(config(tiny_model, 0), *requests)
    assert guessing.num_accepted > 0
    for name in CASES:
        assert guessing.answer(name)[0] == plain.answer(name)[0], name
