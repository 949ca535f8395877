"""A real draft model beside a real decoder: the bits are those without it, and what is refused."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.parity_models import VOCAB_SIZE
from server.engine import assembly
from server.engine.config import AdapterConfig, EngineConfig
from server.engine.errors import EngineSetupError
from server.engine.request import GenerationRequest, SamplingParams
from tests.lora_adapters import save_adapter
from tests.server.engine.test_speculation_model import CASES, PROMPT, Served, config, quantized
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import save_tiny_model

__all__ = ["quantized"]


def drafting(directory: Path, draft: Path) -> EngineConfig:
    return replace(config(directory, 4), draft_model_path=str(draft), kv_cache_bytes=1024 * 1024)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses that cost nothing: a draft as large as its model would never be asked."""
    monkeypatch.setattr(assembly, "draft_cost", lambda _config: 0.0)
    monkeypatch.setattr(assembly, "_NATIVE_ROW_COST", 0.001)
    monkeypatch.setattr(assembly, "_CPU_ROW_COST", 0.001)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_model("llama", tmp_path_factory.mktemp("other") / "model", seed=7)
    quantize_in_place(directory, lambda name: True)
    return directory


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("is_same", [True, False])
def test_the_native_kernels_give_each_request_the_bits_it_gets_without_a_draft_model(
    quantized: Path, other_model: Path, is_same: bool
) -> None:
    requests = [GenerationRequest(name, PROMPT, params) for name, params in CASES.items()]
    guessing = Served(drafting(quantized, quantized if is_same else other_model), *requests)
    plain = Served(config(quantized, 0), *requests)
    assert guessing.stats is not None
    assert guessing.stats.draft_tokens > 0
    assert guessing.num_accepted > 0 or not is_same
    for name in CASES:
        assert guessing.answer(name) == plain.answer(name), name


@pytest.mark.usefixtures("cheap")
def test_guesses_of_the_draft_model_are_checked_by_the_adapter_that_a_request_chose(
    tiny_model: Path, tmp_path: Path
) -> None:
    # given two adapters of the model, of which the draft model knows nothing
    names = ("", "first", "second")
    adapters = tuple(
        AdapterConfig(
            name, str(save_adapter(tmp_path / name, tiny_model, ("q_proj", "down_proj"), seed=seed, alpha=32))
        )
        for seed, name in enumerate(names[1:])
    )
    kinds = {"greedy": SamplingParams(max_tokens=12, temperature=0.0), "drawn": SamplingParams(max_tokens=12, seed=3)}
    requests = [
        GenerationRequest(f"{kind} {name}", PROMPT, params, adapter=name)
        for name in names
        for kind, params in kinds.items()
    ]

    guessing = Served(replace(drafting(tiny_model, tiny_model), adapters=adapters), *requests)

    plain = Served(replace(config(tiny_model, 0), adapters=adapters), *requests)
    assert guessing.num_accepted > 0
    tokens = {one.request_id: guessing.answer(one.request_id)[0] for one in requests}
    assert tokens == {one.request_id: plain.answer(one.request_id)[0] for one in requests}
    assert len({tuple(tokens[f"greedy {name}"]) for name in names}) == len(names)


@pytest.mark.usefixtures("cheap")
def test_drawn_tokens_have_the_models_distribution(tiny_model: Path) -> None:
    # given draws from the three likeliest tokens, the likeliest of which the draft model guesses
    drawn = SamplingParams(max_tokens=3, top_k=3)
    requests = [GenerationRequest(f"r{seed}", PROMPT, replace(drawn, seed=seed)) for seed in range(300)]
    served = Served(drafting(tiny_model, tiny_model), *requests)
    assert served.num_accepted > 50
    outputs = [tuple(served.answer(one.request_id)[0]) for one in requests]
    # then what was drawn where a guess stood is spread as the model spreads it
    deviation = 0.0
    for first in {output[0] for output in outputs}:
        counts = Counter(output[1] for output in outputs if output[0] == first)
        asked = GenerationRequest("p", (*PROMPT, first), SamplingParams(1, temperature=0.0, logprobs=3))
        weights = {
            token: math.exp(score) for token, score in Served(config(tiny_model, 0), asked).answer("p")[1][0].top
        }
        assert counts.keys() <= weights.keys()
        for token, weight in weights.items():
            expected = weight / sum(weights.values()) * counts.total()
            deviation += (counts[token] - expected) ** 2 / expected
    # chi-square of 6 degrees of freedom: one in a thousand is above
    assert deviation < 22.5


def test_settings_that_contradict_each_other_are_refused(tiny_model: Path) -> None:
    with pytest.raises(EngineSetupError, match="num_speculative_tokens is 0, so nothing is guessed"):
        Served(replace(config(tiny_model, 0), draft_model_path=str(tiny_model)))


def test_a_draft_model_of_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    larger = save_tiny_model("llama", tmp_path / "larger", config_overrides={"vocab_size": VOCAB_SIZE + 32})
    with pytest.raises(EngineSetupError, match=f"knows {VOCAB_SIZE + 32} tokens and the model {VOCAB_SIZE}"):
        Served(drafting(tiny_model, larger))
    # given as many tokens, of which two have each other's number
    renumbered = save_tiny_model("llama", tmp_path / "renumbered")
    tokenizer = json.loads((renumbered / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renumbered / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(EngineSetupError, match="gives tokens other numbers"):
        Served(drafting(tiny_model, renumbered))


def test_a_draft_model_is_refused_that_native_kernels_cannot_run(quantized: Path, tiny_model: Path) -> None:
    with pytest.raises(EngineSetupError, match=r"cannot run it: .* Quantize it with awq-serve quantize"):
        Served(drafting(quantized, tiny_model))


def test_what_is_wrong_with_a_draft_models_files_names_it_before_the_model_is_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    broken = save_tiny_model("llama", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineSetupError, match=r"draft_model .*broken: .*model\.norm\.weight"):
        Served(drafting(tiny_model, broken))


def test_a_tokenizer_without_a_list_of_tokens_tells_nothing(tiny_model: Path, tmp_path: Path) -> None:
    odd = save_tiny_model("llama", tmp_path / "odd")
    (odd / "tokenizer.json").write_text(json.dumps({"model": {"type": "of another kind"}, "added_tokens": None}))
    assert Served(drafting(tiny_model, odd)).info.num_blocks > 0


def test_both_caches_share_the_memory(tiny_model: Path) -> None:
    with_draft = Served(drafting(tiny_model, tiny_model))
    without = Served(replace(config(tiny_model, 4), kv_cache_bytes=1024 * 1024))
    assert with_draft.info.num_blocks == without.info.num_blocks // 2
