"""The whole engine on a real, tiny decoder, in this thread: what transformers gives, whatever the batching."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from server.engine.assembly import assemble_engine
from server.engine.config import EngineConfig, KvCacheDType
from server.engine.loop import EngineLoop
from server.engine.request import EngineNews, FinishReason, GenerationRequest, SamplingParams, TokenEvent, TokenLogprob
from server.engine.sampler import NOT_FINITE
from server.engine.step_plan import StepPlan
from server.engine.step_tensors import group_sequences
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

Reference = Callable[[torch.Tensor], torch.Tensor]

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)


class Engine:
    """A loop driven by hand, and the news it gave."""

    def __init__(self, config: EngineConfig) -> None:
        self.events: dict[str, list[TokenEvent]] = defaultdict(list)
        self.loop, self.info = assemble_engine(config, lambda progress: None, self._take)

    def _take(self, news: EngineNews) -> None:
        for event in news.events:
            self.events[event.request_id].append(event)

    def run(self, *requests: GenerationRequest) -> list[list[int]]:
        """The output of each request, all of them submitted at once."""
        for request in requests:
            self.loop.submit(request)
        finish(self.loop)
        return [[token for event in self.events[r.request_id] for token in event.token_ids] for r in requests]


def finish(loop: EngineLoop) -> None:
    while loop.has_work:
        loop.step()
        loop.check_integrity()


def config(directory: Path) -> EngineConfig:
    return EngineConfig(
        str(directory),
        device="cpu",
        dtype="float32",
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=4,
        kv_cache_bytes=512 * 1024,
    )


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())


def request(request_id: str, length: int, params: SamplingParams = GREEDY) -> GenerationRequest:
    return GenerationRequest(request_id, prompt(length), params)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    """Logits [T, vocab] of token ids [T] by transformers."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def logits(token_ids: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            result: torch.Tensor = model(token_ids[None]).logits[0]
        return result

    return logits


def greedy_output(reference: Reference, token_ids: tuple[int, ...], max_tokens: int) -> list[int]:
    known = list(token_ids)
    for _ in range(max_tokens):
        known.append(int(reference(torch.tensor(known))[-1].argmax()))
    return known[len(token_ids) :]


@pytest.mark.parametrize("budget", [8, 13, 64])
def test_greedy_output_is_that_of_transformers(tiny_model: Path, reference: Reference, budget: int) -> None:
    lengths = (1, 3, 4, 17, 50)
    engine = Engine(replace(config(tiny_model), max_num_batched_tokens=budget))
    outputs = engine.run(*(request(f"r{length}", length) for length in lengths))
    assert outputs == [greedy_output(reference, prompt(length), 12) for length in lengths]


def test_preempted_requests_give_what_they_give_alone(tiny_model: Path) -> None:
    requests = [request(f"r{length}", length, replace(GREEDY, max_tokens=40)) for length in (2, 5, 9, 20)]
    # given a cache of 64 tokens for requests that grow to 156 together
    tight = Engine(replace(config(tiny_model), kv_cache_bytes=64 * 2 * 2 * 2 * 16 * 4, max_model_len=64))
    assert tight.info.num_blocks == 16
    outputs = tight.run(*requests)
    roomy = Engine(config(tiny_model))
    assert outputs == [roomy.run(one)[0] for one in requests]


def test_seeded_output_does_not_depend_on_the_batch(tiny_model: Path) -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=7)
    target = request("target", 9, params)
    alone = Engine(config(tiny_model)).run(target)[0]
    mates = [request(f"mate{index}", 3 + index, replace(params, seed=index, top_k=5)) for index in range(5)]
    assert Engine(config(tiny_model)).run(*mates, target)[-1] == alone
    other_seed = GenerationRequest("other", target.prompt_token_ids, replace(params, seed=8))
    assert Engine(config(tiny_model)).run(other_seed)[0] != alone


def test_a_quantized_model_gives_each_request_what_it_gives_alone(tmp_path: Path) -> None:
    # given packed weights: activations are rounded to bf16 there, so a last bit that a neighbour turned would grow
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    directory = save_tiny_model("llama", tmp_path / "model", config_overrides=wide)
    quantize_in_place(directory, lambda name: True)
    # and prompts that are cut: a budget of 107 leaves chunks of 100
    roomy = replace(config(directory), max_num_batched_tokens=107, kv_cache_bytes=8 * 1024**2)
    params = replace(GREEDY, logprobs=1)
    requests = [request(f"r{length}", length, params) for length in (1, 170, 70, 5, 230, 30, 66)]

    def scores(engine: Engine, request_id: str) -> list[float]:
        return [score.logprob for event in engine.events[request_id] for score in event.logprobs]

    # when they run together
    together = Engine(roomy)
    outputs = together.run(*requests)

    # then tokens are the same, and logprobs up to the order in which the output head sums
    for one, output in zip(requests, outputs, strict=True):
        alone = Engine(roomy)
        assert alone.run(one) == [output]
        assert scores(together, one.request_id) == pytest.approx(scores(alone, one.request_id), abs=1e-5)


def test_a_deterministic_engine_gives_an_unquantized_model_the_very_bits(tiny_model: Path) -> None:
    # given sampled and greedy requests, prompts that are cut and some that begin alike
    told = replace(config(tiny_model), deterministic=True)
    params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=3, logprobs=3)
    beginning = prompt(90)
    requests = [
        *(request(f"r{length}", length, params) for length in (1, 70, 5, 130)),
        GenerationRequest("first", (*beginning, 1, 2), replace(params, temperature=0.0)),
        GenerationRequest("second", (*beginning, 3), replace(params, prompt_logprobs=2)),
    ]
    together = Engine(told)
    together.run(*requests)

    for one in requests:
        alone = Engine(told)
        alone.run(one)
        # but for how much was found in the cache
        events = [event._replace(num_cached_tokens=0) for event in together.events[one.request_id]]
        assert events == alone.events[one.request_id]


@pytest.mark.parametrize("packed", [(), ("w1", "w3"), ("w2",)])
def test_a_deterministic_mixture_of_float_experts_gives_each_request_the_bits_that_it_gets_alone(
    packed: tuple[str, ...], tmp_path: Path
) -> None:
    # given experts that are floats, or partly
    directory = save_tiny_model("mixtral", tmp_path)
    if packed:
        quantize_in_place(directory, lambda name: "experts" in name and name.endswith(packed))
    deterministic = replace(config(directory), deterministic=True)
    requests = [request(f"r{length}", length, replace(GREEDY, logprobs=2)) for length in (1, 40, 5)]
    together = Engine(deterministic)
    together.run(*requests)
    for one in requests:
        alone = Engine(deterministic)
        alone.run(one)
        scores = [event.logprobs for event in alone.events[one.request_id]]
        assert [event.logprobs for event in together.events[one.request_id]] == scores


@pytest.mark.parametrize("lens", [[1], [64], [65], [200], [1, 1, 1], [60, 5, 59, 1], [64, 64], [1, 200, 1, 63]])
def test_sequences_run_in_groups_of_few_rows_and_long_ones_alone(lens: list[int]) -> None:
    plan = StepPlan(
        request_ids=tuple(map(str, range(len(lens)))),
        token_ids=np.zeros(sum(lens), dtype=np.int64),
        positions=np.concatenate([np.arange(length) for length in lens]),
        query_starts=np.cumsum([0, *lens], dtype=np.int32),
        context_lens=np.array(lens, dtype=np.int32),
        block_tables=np.zeros((len(lens), 200), dtype=np.int32),
        sampling_rows=(),
    )

    runs = group_sequences(plan, 64)

    assert [index for run in runs for index in run] == list(range(len(lens)))
    for run in runs:
        assert sum(lens[index] for index in run) <= 64 or len(run) == 1
    # no two neighbouring runs could have been one
    assert all(sum(lens[a.start : b.stop]) > 64 for a, b in pairwise(runs))
    assert group_sequences(plan, None) == [range(len(lens))]


def test_a_stop_token_ends_the_output_and_is_its_last_token(tiny_model: Path) -> None:
    engine = Engine(config(tiny_model))
    free = engine.run(request("free", 6))[0]
    stop_id = free[4]
    stopped = request("stopped", 6, replace(GREEDY, stop_token_ids=(stop_id,)))
    assert engine.run(stopped)[0] == free[: free.index(stop_id) + 1]
    assert engine.events["stopped"][-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("budget", [8, 64])
def test_prompt_logprobs_are_those_of_the_model(tiny_model: Path, reference: Reference, budget: int) -> None:
    engine = Engine(replace(config(tiny_model), max_num_batched_tokens=budget))
    engine.run(request("r", 21, replace(GREEDY, max_tokens=2, prompt_logprobs=3, logprobs=3)))
    first = engine.events["r"][0]
    token_ids = torch.tensor(prompt(21) + engine.events["r"][0].token_ids)
    expected = reference(token_ids).log_softmax(-1)
    assert first.prompt_logprobs[0] is None
    scored: list[TokenLogprob] = [score for score in first.prompt_logprobs if score] + list(first.logprobs)
    assert [score.token_id for score in scored] == token_ids[1:].tolist()
    for position, score in enumerate(scored):
        assert score.logprob == pytest.approx(expected[position, score.token_id].item(), abs=1e-4)
        assert [token for token, _ in score.top] == expected[position].topk(3).indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(expected[position].topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    # a step of e4m3 is up to eight times one of int8
    ("kv_cache_dtype", "tolerance"),
    [("bfloat16", 0.02), ("float16", 0.005), ("int8", 0.05), ("fp8", 0.4)],
)
def test_a_smaller_cache_gives_nearly_the_models_own_logprobs(
    tiny_model: Path, reference: Reference, kv_cache_dtype: KvCacheDType, tolerance: float
) -> None:
    # in chunks, so that all of a prompt but its first part reads what was written before
    engine = Engine(replace(config(tiny_model), kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=16))
    engine.run(request("r", 40, replace(GREEDY, max_tokens=20, prompt_logprobs=0, logprobs=0)))

    event = engine.events["r"]
    token_ids = torch.tensor([*prompt(40), *(token for news in event for token in news.token_ids)])
    scored = [score for score in event[0].prompt_logprobs if score] + [
        score for news in event for score in news.logprobs
    ]
    expected = reference(token_ids).log_softmax(-1)
    assert len(scored) == 59
    for position, score in enumerate(scored):
        assert score.logprob == pytest.approx(expected[position, score.token_id].item(), abs=tolerance)
    # each token is the model's own choice, or as good as that
    for position in range(39, 59):
        best = expected[position].max().item()
        assert expected[position, token_ids[position + 1]].item() == pytest.approx(best, abs=2 * tolerance)


def test_a_poisoned_token_fails_its_request_and_leaves_nothing_behind(tmp_path: Path) -> None:
    # given a model whose embedding of token 200 is broken, and a head of its own
    directory = save_tiny_model("llama", tmp_path / "model", config_overrides={"tie_word_embeddings": False})
    tensors = load_file(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"][200] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    engine = Engine(config(directory))
    assert 200 not in prompt(20)
    clean = engine.run(request("clean", 20))[0]

    outputs = engine.run(GenerationRequest("sick", (200,) * 20, GREEDY), request("beside", 20))

    assert outputs == [[], clean]
    assert engine.events["sick"][-1].finish_reason is FinishReason.ERROR
    assert engine.events["sick"][-1].error == NOT_FINITE
    # and the blocks it used serve others
    assert engine.run(*(request(f"after {index}", 20) for index in range(8))) == [clean] * 8
