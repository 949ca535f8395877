"""Copied blocks in a real decoder: a prompt that comes again gets the bits that it got, for one token's work."""

from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.request import GenerationRequest, SamplingParams
from tests.server.engine.served import Served, config, quantized_model

GREEDY = SamplingParams(max_tokens=20, temperature=0.0, logprobs=2)


@pytest.mark.parametrize("num_prompt", [32, 33, 45])
def test_a_prompt_that_comes_again_gets_the_bits_that_it_got(num_prompt: int, tmp_path: Path) -> None:
    # given blocks of 16, and one sequence at a time
    settings = replace(config(quantized_model(tmp_path), 0), max_num_seqs=1)
    prompt = tuple(range(5, 5 + num_prompt))
    served = Served(settings, *(GenerationRequest(name, prompt, GREEDY) for name in ("first", "again")))
    assert served.info.kernels.startswith("native")
    assert served.events["again"][0].num_cached_tokens == num_prompt - 1
    assert served.answer("again") == served.answer("first")


def test_prompts_that_part_inside_of_a_block_get_what_they_get_alone(tmp_path: Path) -> None:
    settings = replace(config(quantized_model(tmp_path), 0), max_num_seqs=1)
    requests = [GenerationRequest(str(last), (*range(5, 45), last), GREEDY) for last in (50, 60)]
    together, alone = Served(settings, *requests), Served(settings, requests[1])
    assert together.events["60"][0].num_cached_tokens == 40
    assert together.answer("60") == alone.answer("60")
