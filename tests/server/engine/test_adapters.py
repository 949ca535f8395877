"""Requests with adapters in one engine: each gets what it gets alone, and shares cached prompts with its own kind."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quant.checkpoint.folded_scales import FOLDED_SCALES_FILE, ModuleScales, encode_folded_scales
from server.engine.assembly import assemble_engine
from server.engine.config import AdapterConfig, EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.in_process_client import InProcessEngineClient
from server.engine.request import GenerationRequest, ModelInfo, SamplingParams, TokenEvent
from server.engine.sequence import Sequence
from server.errors import InvalidRequest
from tests.lora_adapters import save_adapter
from tests.server.model.quantized_models import quantize_in_place

NAMES = ("", "first", "second")
PROMPT = tuple(range(40, 75))


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    root = tmp_path_factory.mktemp("adapters")
    paths = {
        name: save_adapter(root / name, tiny_model, ("q_proj", "v_proj", "down_proj"), seed=seed, alpha=32)
        for seed, name in enumerate(NAMES[1:])
    }
    return EngineConfig(
        str(tiny_model),
        device="cpu",
        cpu_kernel="auto",
        max_num_seqs=8,
        block_size=8,
        max_model_len=128,
        deterministic=True,
        adapters=tuple(AdapterConfig(name, str(path)) for name, path in paths.items()),
    )


def requests() -> list[GenerationRequest]:
    """Per adapter a greedy one, a seeded one of the same prompt, and one that wants its prompt scored."""
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    kinds = (greedy, SamplingParams(max_tokens=12, seed=3), replace(greedy, prompt_logprobs=1))
    return [
        GenerationRequest(f"{name}-{number}", PROMPT, params, adapter=name)
        for name in NAMES
        for number, params in enumerate(kinds)
    ]


def run(config: EngineConfig, groups: list[list[GenerationRequest]]) -> dict[str, list[TokenEvent]]:
    """The events of all requests; those of a group run together, the groups one after the other."""

    async def collect(client: InProcessEngineClient, request: GenerationRequest) -> tuple[str, list[TokenEvent]]:
        return request.request_id, [event async for event in client.generate(request)]

    async def run_all() -> dict[str, list[TokenEvent]]:
        client = InProcessEngineClient(config)
        await client.start()
        status = await client.wait_until_settled()
        assert status.state == "ready", status.detail
        found = [pair for group in groups for pair in await asyncio.gather(*(collect(client, one) for one in group))]
        await client.stop(drain_seconds=0)
        return dict(found)

    return asyncio.run(run_all())


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def prompt_scores(events: list[TokenEvent]) -> list[float]:
    return [score.logprob for event in events for score in event.prompt_logprobs if score is not None]


def test_requests_of_two_adapters_and_of_none_get_together_what_they_get_alone(config: EngineConfig) -> None:
    alone = run(replace(config, prefix_caching=False), [[request] for request in requests()])

    together = run(config, [requests()])
    # a cache where three start, and two end: the third is preempted
    crowded = run(replace(config, kv_cache_bytes=16 * 8 * 2 * 2 * 2 * 16 * 4), [requests()])

    assert {name: tokens(events) for name, events in together.items()} == {
        name: tokens(events) for name, events in alone.items()
    }
    assert {name: tokens(events) for name, events in crowded.items()} == {
        name: tokens(events) for name, events in alone.items()
    }
    assert len({tuple(tokens(alone[f"{name}-0"])) for name in NAMES}) == len(NAMES)
    scores = [prompt_scores(together[f"{name}-2"]) for name in NAMES]
    assert scores == [prompt_scores(alone[f"{name}-2"]) for name in NAMES]
    assert len({tuple(of_one) for of_one in scores}) == len(NAMES)


def test_guesses_are_checked_by_the_adapter_that_a_request_chose(config: EngineConfig) -> None:
    plain = replace(config, deterministic=False)
    greedy = [request for request in requests() if request.request_id.endswith("-0")]

    guessed = run(replace(plain, num_speculative_tokens=4), [greedy])

    assert {name: tokens(events) for name, events in guessed.items()} == {
        name: tokens(events) for name, events in run(plain, [greedy]).items()
    }


def test_a_prompt_is_shared_by_one_adapter_only(config: EngineConfig) -> None:
    plain = replace(config, deterministic=False)
    first, second, again = (
        replace(request, request_id=f"{index}")
        for index, request in enumerate((requests()[3], requests()[6], requests()[3]))
    )

    events = run(plain, [[first], [second], [again]])

    cached = [max(event.num_cached_tokens for event in events[name]) for name in ("0", "1", "2")]
    assert cached == [0, 0, len(PROMPT) // 8 * 8]


def test_no_salt_can_be_taken_for_an_adapter() -> None:
    params = SamplingParams(max_tokens=1)
    given = [("a", "b"), ("", "ab"), ("ab", ""), ("", "1:ab"), ("a", "1:b")]

    keys = {
        Sequence(GenerationRequest("r", PROMPT, params, cache_salt=salt, adapter=adapter), 8).block_keys(8)[0]
        for adapter, salt in given
    }

    assert len(keys) == len(given)


def test_it_says_how_an_adapter_is_taken_over_a_quantized_checkpoint(config: EngineConfig, tmp_path: Path) -> None:
    # given an AWQ checkpoint of another tool, which does not say what is folded into it
    checkpoint = shutil.copytree(config.model_path, tmp_path / "awq")
    quantize_in_place(checkpoint, lambda name: True)
    awq = replace(config, model_path=str(checkpoint), adapters=config.adapters[:1])

    def ask() -> ModelInfo:
        return assemble_engine(awq, lambda progress: None, lambda news: None)[1]

    doubted = ask()
    (checkpoint / FOLDED_SCALES_FILE).write_bytes(
        encode_folded_scales({"model.layers.0.self_attn.q_proj": ModuleScales(torch.ones(64) / 2)})
    )
    fitted = ask()

    ((doubt,), (note,)) = doubted.adapter_doubts, fitted.adapter_notes
    assert doubt.startswith("first may add something else than it learned")
    assert note.startswith("first is multiplied by the scales that are folded into this checkpoint")
    assert doubted.adapter_notes == ()
    # it names no base
    (doubt,) = fitted.adapter_doubts
    assert doubt.startswith("first is taken for an adapter of the original")


def test_what_the_engine_says_and_refuses(config: EngineConfig, tmp_path: Path) -> None:
    _, info = assemble_engine(config, lambda progress: None, lambda news: None)
    assert info.adapters == NAMES[1:]
    assert info.kernels == "torch, as the native kernels cannot be used: they compute no adapters"

    with pytest.raises(InvalidRequest, match="there is no adapter 'third'"):
        run(config, [[replace(requests()[0], adapter="third")]])
    with pytest.raises(EngineSetupError, match=r"cpu_kernel is native, but .*: they compute no adapters; use auto"):
        assemble_engine(replace(config, cpu_kernel="native"), lambda progress: None, lambda news: None)
