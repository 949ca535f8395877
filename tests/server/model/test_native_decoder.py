"""The native decoder is transformers on the dequantized weights, and each sequence gets the bits that it gets alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.parity_models import PARITY_MODELS
from kernels.native_cpu import allocate_native_layer
from server.model.loader import LoadedModel, load_model
from server.model.native_decoder import NativeDecoder
from server.model.native_loader import find_native_obstacle
from tests.kernels.native_libraries import open_native
from tests.paged_cache import Chunk, build_batch, build_positions
from tests.server.model.quantized_models import quantize_in_place
from tests.tiny_models import TINY_MODEL_TYPES, VOCAB_SIZE, save_tiny_model

BLOCK_SIZE = 16
NUM_TOKENS = 40
# two layers of four products of 11 bits, and a head of 8: a hundredth of the logits' spread of 1 at worst
TOLERANCE = 0.05
TYPICAL_ERROR = 0.008


def everything(module_name: str) -> bool:
    return True


def load(directory: Path) -> LoadedModel:
    assert find_native_obstacle(directory) is None
    return load_model(directory, torch.device("cpu"), None, lambda progress: None, open_native())


def run_steps(model: LoadedModel, steps: list[list[tuple[Chunk, Tensor]]]) -> list[list[Tensor]]:
    """The logits of every chunk of every step, each with its tokens, over one cache of 20 blocks."""
    config = model.config
    layers = [
        allocate_native_layer(20, config.num_kv_heads, BLOCK_SIZE, config.head_dim) for _ in range(config.num_layers)
    ]
    logits = []
    with torch.inference_mode():
        for step in steps:
            chunks = [chunk for chunk, _ in step]
            token_ids = torch.cat([tokens for _, tokens in step])
            hidden = model.decoder.forward(token_ids, build_positions(chunks), build_batch(chunks, BLOCK_SIZE), layers)
            logits.append(list(model.decoder.compute_logits(hidden).split([chunk.num_new for chunk in chunks])))
    return logits


def random_tokens(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*TINY_MODEL_TYPES, "granite", "phi3", "llama, yarn", "phi3, longrope, long"])
def test_the_native_decoder_is_transformers_on_dequantized_weights(name: str, tmp_path: Path) -> None:
    tiny = PARITY_MODELS[name]
    dense = save_tiny_model(tiny.model_type, tmp_path / "dense", config_overrides=tiny.fields)
    quantized = save_tiny_model(tiny.model_type, tmp_path / "quantized", config_overrides=tiny.fields)
    weights = quantize_in_place(quantized, everything)
    tokens = random_tokens(NUM_TOKENS)

    model = load(quantized)
    [[logits]] = run_steps(model, [[(Chunk(range(3), 0, NUM_TOKENS), tokens)]])

    reference = AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager")
    reference.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        errors = (logits - reference(tokens[None]).logits[0]).abs()
    assert isinstance(model.decoder, NativeDecoder)
    assert float(errors.max()) < TOLERANCE
    assert float(errors.mean()) < TYPICAL_ERROR


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_any_chunks_beside_any_others_give_the_same_bits(model_type: str, tmp_path: Path) -> None:
    quantize_in_place(save_tiny_model(model_type, tmp_path), everything)
    model = load(tmp_path)
    tokens, others = random_tokens(NUM_TOKENS), random_tokens(90, seed=1)
    [[whole]] = run_steps(model, [[(Chunk(range(3), 0, NUM_TOKENS), tokens)]])

    steps, start = [], 0
    for count in (1, 7, 16, 1, 15):
        other = (Chunk(range(3, 10), 0, 90), others)
        steps.append([other, (Chunk(range(3), start, count), tokens[start : start + count])])
        start += count
    parts = [logits[1] for logits in run_steps(model, steps)]

    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    ("overrides", "wanted", "obstacle"),
    [
        ({}, lambda name: "mlp" in name, "self_attn.q_proj is not quantized"),
        ({"head_dim": 24}, everything, "its heads are 24 wide, no multiple of 16"),
    ],
)
def test_a_model_that_it_cannot_compute_is_told_apart(
    overrides: dict[str, object], wanted: Callable[[str], bool], obstacle: str, tmp_path: Path
) -> None:
    quantize_in_place(save_tiny_model("llama", tmp_path, config_overrides=overrides), wanted)

    assert obstacle in str(find_native_obstacle(tmp_path))


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("mixtral", "mixtures of experts"),
        ("gemma", "its norms are of another kind"),
        ("olmo2", "its norms are at other places"),
        ("cohere", "its norms are of another kind"),
        ("glm4", "its norms are at other places"),
        ("smollm3", "its layers do not all turn alike"),
        ("phi3, part of heads turns", "only a part of its heads turns"),
    ],
)
def test_a_family_that_it_cannot_compute_is_told_apart(name: str, obstacle: str, tmp_path: Path) -> None:
    tiny = PARITY_MODELS[name]
    save_tiny_model(tiny.model_type, tmp_path, config_overrides=tiny.fields)

    assert obstacle in str(find_native_obstacle(tmp_path))
