"""Outputs keep to their grammars beside others that have none; a grammar that fails ends its own request."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.engine.draft_length import DraftCost, Speculation
from server.engine.loop import EngineLoop
from server.engine.request import FinishReason, GenerationRequest, SamplingParams, StructuredOutput
from server.engine.sampler import NONE_LEFT, sample
from server.engine.scheduler import SchedulerLimits
from server.engine.sequence import Sequence
from server.engine.step_plan import SamplingRow
from server.engine.structured_output import OutputGuide
from tests.fakes import fake_model_info
from tests.server.engine.automaton import FINAL, Automata, Automaton, MaskedRunner, allowed_tokens, bits
from tests.server.engine.simulation import MAX_MODEL_LEN, Simulation, request

# (5 6)* 7, and 8 loops that draw on for long; 9 ends
PAIRS = f"0 5 1\n1 6 0\n0 7 {FINAL}"
LONG = f"0 5 1\n1 6 2\n2 7 0\n2 8 0\n0 9 {FINAL}"
GUESSING = Speculation(num_tokens=4, row_cost=0.001)


def guided(request_id: str, source: str, num_prompt: int = 5, max_tokens: int = 20) -> GenerationRequest:
    plain = request(request_id, num_prompt, max_tokens)
    return replace(plain, sampling=replace(plain.sampling, structure=StructuredOutput("grammar", source)))


def engine_of(limits: SchedulerLimits, num_blocks: int = 40) -> Simulation:
    engine = Simulation(num_blocks, 4, limits, MaskedRunner)
    info = fake_model_info(max_model_len=MAX_MODEL_LEN, num_blocks=num_blocks, block_size=4)
    engine.loop = EngineLoop(engine.scheduler, engine.runner, info, engine._take, lambda: 0.0, Automata())
    return engine


def answer_alone(one: GenerationRequest) -> tuple[tuple[int, ...], list[FinishReason]]:
    engine = engine_of(SchedulerLimits(8, 64))
    engine.loop.submit(one)
    engine.run_to_end()
    return engine.output(one.request_id), engine.finish_reasons(one.request_id)


def keeps_to(source: str, output: tuple[int, ...]) -> bool:
    automaton = Automaton(source)
    return all(automaton.advance(token) for token in output)


@pytest.mark.parametrize(
    "limits",
    [
        SchedulerLimits(8, 24),
        SchedulerLimits(8, 64, speculation=GUESSING),
        SchedulerLimits(8, 40, prefill_chunk=8, deterministic=True, speculation=GUESSING),
    ],
)
@pytest.mark.parametrize("num_blocks", [15, 80])
def test_in_any_batch_each_output_keeps_to_its_structure_and_is_the_one_it_is_alone(
    limits: SchedulerLimits, num_blocks: int
) -> None:
    rng = random.Random(0)
    sources = [rng.choice((PAIRS, LONG, None)) for _ in range(40)]
    requests = [
        # as the samples of one request do, several begin alike
        request(f"r{index}", 3 + index % 4, 40) if source is None else guided(f"r{index}", source, 3 + index % 4, 40)
        for index, source in enumerate(sources)
    ]
    engine = engine_of(limits, num_blocks)
    for one in requests:
        engine.loop.submit(one)
    engine.run_to_end()
    assert engine.pool.num_free == num_blocks
    for one, source in zip(requests, sources, strict=True):
        assert (engine.output(one.request_id), engine.finish_reasons(one.request_id)) == answer_alone(one)
        assert source is None or keeps_to(source, engine.output(one.request_id))
    stats = engine.scheduler.stats()
    assert (stats.num_preemptions > 0) == (num_blocks == 15)
    assert (stats.accepted_tokens > 0) == (limits.speculation is not None)


def test_an_output_that_is_whole_ends_its_request() -> None:
    output, reasons = answer_alone(guided("r", f"0 5 1\n1 6 {FINAL}"))
    assert output == (5, 6)
    assert reasons == [FinishReason.STOP]


def test_of_guesses_those_are_cut_that_the_structure_forbids() -> None:
    guide = OutputGuide(Automaton(LONG), 1000)
    # given guesses whose third is not allowed where it stands
    assert guide.cut([5, 6, 5]) == 2
    assert [allowed_tokens(mask) for mask in guide.masks(2)] == [[5, 9], [6], [7, 8]]
    # then the guide still stands before them
    assert guide.take(9) is None
    assert guide.is_finished


def test_nothing_is_guessed_that_nothing_may_follow() -> None:
    guide = OutputGuide(Automaton(LONG), 1000)
    assert guide.cut([9, 5]) == 0
    assert allowed_tokens(guide.masks(0)[0]) == [5, 9]


def test_guesses_that_the_structure_always_forbids_are_soon_asked_for_no_more() -> None:
    sequence = Sequence(guided("r", LONG), 4)
    sequence.guide = OutputGuide(Automaton(LONG), 1000)
    num_asked = 0
    for _ in range(20):
        if sequence.choose_draft_length(4, DraftCost(guess=0.3)):
            num_asked += 1
            sequence.put_draft(np.array([99, 99]))
            assert not sequence.num_drafted
    assert 0 < num_asked < 6


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("crash" + LONG, "could not be followed: the library has a defect"),
        ("0 5 1", "allows no token here"),
        ("no automaton", "the grammar cannot be followed: "),
    ],
)
@pytest.mark.parametrize("speculation", [None, GUESSING])
def test_a_grammar_that_fails_ends_its_request_and_no_other(
    source: str, words: str, speculation: Speculation | None
) -> None:
    engine = engine_of(SchedulerLimits(8, 64, speculation=speculation))
    engine.loop.submit(guided("sick", source))
    engine.loop.submit(guided("well", LONG))
    engine.run_to_end()
    assert engine.finish_reasons("sick") == [FinishReason.ERROR]
    assert words in str(engine.events["sick"][-1].error)
    assert engine.output("well") == answer_alone(guided("well", LONG))[0]
    assert engine.pool.num_free == engine.num_blocks


def test_without_a_grammar_library_a_structure_is_refused_in_words() -> None:
    engine = Simulation(40, 4, SchedulerLimits(8, 64), MaskedRunner)
    engine.loop.submit(guided("r", LONG))
    assert engine.finish_reasons("r") == [FinishReason.ERROR]
    assert engine.events["r"][0].error == "this engine runs without a grammar library: ask for no structured output"


def row(params: SamplingParams, allowed: tuple[int, ...] | None) -> SamplingRow:
    text = np.array([1], dtype=np.int64)
    return SamplingRow("r", 0, params, text, 1, 1, None if allowed is None else bits(allowed, 50))


def test_the_sampler_draws_what_is_allowed_and_nothing_else() -> None:
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    # given rows with a mask, one after the other with rows without
    drawn = SamplingParams(max_tokens=9)
    rows = [row(replace(drawn, seed=seed), (3, 31, 32, 49) if seed % 2 else None) for seed in range(40)]
    tokens = [token.token_id for token in sample(logits, rows)]
    assert set(tokens[1::2]) <= {3, 31, 32, 49}
    assert len(set(tokens[1::2])) > 1
    # then a mask changes nothing in the other rows
    assert tokens[::2] == [token.token_id for token in sample(logits[::2], rows[::2])]


def test_a_greedy_row_takes_the_largest_that_is_allowed() -> None:
    greedy = SamplingParams(max_tokens=9, temperature=0.0)
    assert sample(torch.arange(50.0)[None], [row(greedy, (4, 33))])[0].token_id == 33


def test_a_row_of_which_everything_is_barred_fails_alone_and_says_why() -> None:
    params = SamplingParams(max_tokens=9, temperature=0.0, min_tokens=3, stop_token_ids=(4,))
    tokens = sample(torch.zeros(2, 50), [row(params, (4,)), row(params, (4, 5))])
    assert tokens[0].error == NONE_LEFT
    assert tokens[1].token_id == 5
