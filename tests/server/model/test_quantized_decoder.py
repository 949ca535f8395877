"""The decoder on packed weights is transformers on the dequantized ones, up to the CPU kernels' bf16 rounding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.parity_models import FAMILIES, PARITY_MODELS
from server.model.layers import DenseLinear, JoinedLinear, QuantizedLinear
from server.model.loader import LoadedModel, load_model
from tests.paged_cache import Chunk, build_batch, build_layers, build_positions
from tests.server.model.quantized_models import TENSOR_FILE, quantize_in_place
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

# two layers of four linears, each with three roundings to 8 significant bits, 2**-8 / sqrt(3) of the value each: about
# 0.011 of the logits' spread of 1; twice that is allowed on average, and eleven times for the worst of ten thousand
TYPICAL_ERROR = 0.022
TOLERANCE = 0.12
NUM_TOKENS = 40


def everything(module_name: str) -> bool:
    return True


def run_prompt(model: LoadedModel, token_ids: Tensor, num_sequences: int = 1) -> Tensor:
    config = model.config
    kv_layers = build_layers(
        config.num_layers,
        num_blocks=3 * num_sequences,
        num_kv_heads=config.num_kv_heads,
        block_size=16,
        head_dim=config.head_dim,
    )
    chunks = [Chunk(range(3 * i, 3 * i + 3), 0, len(token_ids)) for i in range(num_sequences)]
    with torch.inference_mode():
        hidden = model.decoder.forward(
            token_ids.repeat(num_sequences), build_positions(chunks), build_batch(chunks, 16), kv_layers
        )
        return model.decoder.compute_logits(hidden)


def dense_logits(directory: Path, weights: dict[str, Tensor], token_ids: Tensor) -> Tensor:
    save_file(weights, directory / TENSOR_FILE, metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.inference_mode():
        logits: Tensor = model(token_ids[None]).logits[0]
    return logits


@pytest.fixture
def token_ids() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*FAMILIES, "cohere, q and k norms", "phi3, part of heads turns"])
def test_packed_weights_stand_for_the_dequantized_ones(name: str, tmp_path: Path, token_ids: Tensor) -> None:
    tiny = PARITY_MODELS[name]
    # given every expert chosen, as rounding may turn a choice
    has_experts = "num_experts_per_tok" in FAMILIES[tiny.model_type]
    fields = {**tiny.fields, **({"num_experts_per_tok": 4, "num_experts": 4} if has_experts else {})}
    dense = save_tiny_model(tiny.model_type, tmp_path / "dense", config_overrides=fields)
    quantized = save_tiny_model(tiny.model_type, tmp_path / "quantized", config_overrides=fields)
    weights = quantize_in_place(quantized, everything)

    model = load_model(quantized, torch.device("cpu"), None, lambda progress: None)

    expected = dense_logits(dense, weights, token_ids)
    # norms that multiply by 1 + w give logits of a wider spread
    errors = (run_prompt(model, token_ids) - expected).abs() / expected.std().clamp(min=1)
    assert isinstance(model.decoder.layers[0].attention.output, QuantizedLinear)
    assert float(errors.max()) < TOLERANCE
    assert float(errors.mean()) < TYPICAL_ERROR


def test_many_rows_give_what_few_rows_give(tmp_path: Path, token_ids: Tensor) -> None:
    # given so many sequences that the step takes the kernel for many rows
    directory = save_tiny_model("llama", tmp_path)
    quantize_in_place(directory, everything)
    model = load_model(directory, torch.device("cpu"), None, lambda progress: None)

    alone, together = run_prompt(model, token_ids), run_prompt(model, token_ids, num_sequences=4)

    torch.testing.assert_close(together, alone.repeat(4, 1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("wanted", "qkv_kind", "gate_up_kind"),
    [
        (lambda name: "mlp" in name, DenseLinear, QuantizedLinear),
        (lambda name: "q_proj" not in name, JoinedLinear, QuantizedLinear),
        (lambda name: "up_proj" in name, DenseLinear, JoinedLinear),
    ],
    ids=["only the mlp", "all but the queries", "only up"],
)
def test_a_checkpoint_may_quantize_some_modules_only(
    wanted: Callable[[str], bool], qkv_kind: type, gate_up_kind: type, tmp_path: Path, token_ids: Tensor
) -> None:
    dense = save_tiny_model("qwen2", tmp_path / "dense")
    quantized = save_tiny_model("qwen2", tmp_path / "quantized")
    weights = quantize_in_place(quantized, wanted)

    model = load_model(quantized, torch.device("cpu"), None, lambda progress: None)

    errors = (run_prompt(model, token_ids) - dense_logits(dense, weights, token_ids)).abs()
    assert isinstance(model.decoder.layers[1].attention.qkv, qkv_kind)
    assert isinstance(model.decoder.layers[1].mlp.gate_up, gate_up_kind)
    assert float(errors.max()) < TOLERANCE
