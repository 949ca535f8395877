"""The decoder gives what transformers gives, however a sequence's tokens are spread over steps."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.parity_models import PARITY_MODELS, TinyModel
from server.model.loader import LoadedModel, load_model
from tests.paged_cache import Chunk, build_batch, build_layers, build_positions
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

BLOCK_SIZE = 8
NUM_BLOCKS = 40
# both compute in float32; what is left is the order of summation, of logits with a spread of 1 to 4
TOLERANCE = 5e-5
SEQUENCE_LEN = 61
# families, and what their configs can ask for besides
VARIANTS: dict[str, TinyModel] = {
    **PARITY_MODELS,
    "llama with biases": TinyModel("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral without a window": TinyModel("mistral", {"sliding_window": None}),
    "qwen2 with a window from layer 1 on": TinyModel(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "one head of its own for every query": TinyModel("llama", {"num_key_value_heads": 4}),
    "heads wider than hidden size over heads": TinyModel("qwen3", {"head_dim": 32}),
    "mixtral with a window": TinyModel("mixtral", {"sliding_window": 24}),
    "qwen2_moe with a dense layer, a window and weights that add up": TinyModel(
        "qwen2_moe",
        {
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "qwen3_moe with every second layer sparse, a window and weights as they are": TinyModel(
        "qwen3_moe",
        {
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
}


class Run:
    """A model with its caches; steps are run one after the other, as an engine does."""

    def __init__(self, directory: Path) -> None:
        self.model: LoadedModel = load_model(directory, torch.device("cpu"), None, lambda progress: None)
        config = self.model.config
        self.kv_layers = build_layers(
            config.num_layers,
            num_blocks=NUM_BLOCKS,
            num_kv_heads=config.num_kv_heads,
            block_size=BLOCK_SIZE,
            head_dim=config.head_dim,
        )

    def step(self, token_ids: Sequence[Tensor], chunks: Sequence[Chunk]) -> list[Tensor]:
        """Logits of every new token, a tensor [num_new, vocab] a chunk."""
        with torch.inference_mode():
            hidden = self.model.decoder.forward(
                torch.cat(list(token_ids)), build_positions(chunks), build_batch(chunks, BLOCK_SIZE), self.kv_layers
            )
            logits = self.model.decoder.compute_logits(hidden)
        return list(logits.split([chunk.num_new for chunk in chunks]))


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda name: str(name).replace(" ", "-"))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = VARIANTS[request.param]
    return save_tiny_model(model.model_type, tmp_path_factory.mktemp("model"), config_overrides=model.fields)


@pytest.fixture(scope="module")
def reference(directory: Path) -> Callable[[Tensor], Tensor]:
    """transformers' logits [T, vocab] of one sequence of token ids [T]."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")

    def compute(token_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(token_ids[None]).logits[0]
        return logits

    return compute


def random_tokens(num_tokens: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed))


def shuffled_blocks(seed: int) -> list[int]:
    return torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_prompt_in_one_step(directory: Path, reference: Callable[[Tensor], Tensor]) -> None:
    tokens = random_tokens(SEQUENCE_LEN, seed=1)

    [logits] = Run(directory).step([tokens], [Chunk(shuffled_blocks(1)[:8], 0, SEQUENCE_LEN)])

    torch.testing.assert_close(logits, reference(tokens), atol=TOLERANCE, rtol=0)


def test_a_prompt_in_chunks(directory: Path, reference: Callable[[Tensor], Tensor]) -> None:
    tokens = random_tokens(SEQUENCE_LEN, seed=2)
    run, blocks = Run(directory), shuffled_blocks(2)[:8]

    logits = []
    for start, stop in ((0, 5), (5, 32), (32, 33), (33, SEQUENCE_LEN)):
        logits += run.step([tokens[start:stop]], [Chunk(blocks, start, stop - start)])

    torch.testing.assert_close(torch.cat(logits), reference(tokens), atol=TOLERANCE, rtol=0)


def test_token_by_token(directory: Path, reference: Callable[[Tensor], Tensor]) -> None:
    tokens = random_tokens(SEQUENCE_LEN, seed=3)
    run, blocks = Run(directory), shuffled_blocks(3)[:8]

    logits = []
    for position in range(SEQUENCE_LEN):
        logits += run.step([tokens[position : position + 1]], [Chunk(blocks, position, 1)])

    torch.testing.assert_close(torch.cat(logits), reference(tokens), atol=TOLERANCE, rtol=0)


def test_sequences_at_different_stages_in_one_step(directory: Path, reference: Callable[[Tensor], Tensor]) -> None:
    # given three sequences that have run to different points
    lens, cached = (47, 20, SEQUENCE_LEN), (46, 19, 30)
    tokens = [random_tokens(length, seed=10 + index) for index, length in enumerate(lens)]
    blocks = shuffled_blocks(4)
    tables = [blocks[0:6], blocks[6:9], blocks[9:17]]
    run = Run(directory)
    for sequence, table, num_cached in zip(tokens, tables, cached, strict=True):
        run.step([sequence[:num_cached]], [Chunk(table, 0, num_cached)])

    # when one step decodes two of them, continues the third's prompt and starts a fourth
    tokens.append(random_tokens(9, seed=20))
    tables.append(blocks[17:19])
    stages = (*cached, 0)
    chunks = [
        Chunk(table, num_cached, len(sequence) - num_cached)
        for sequence, table, num_cached in zip(tokens, tables, stages, strict=True)
    ]
    order = (1, 2, 0, 3)
    logits = run.step([tokens[i][stages[i] :] for i in order], [chunks[i] for i in order])

    # then each gets what it gets alone
    for i, got in zip(order, logits, strict=True):
        torch.testing.assert_close(got, reference(tokens[i])[stages[i] :], atol=TOLERANCE, rtol=0)


def test_logits_are_float32(directory: Path) -> None:
    [logits] = Run(directory).step([random_tokens(3, seed=5)], [Chunk([0], 0, 3)])

    assert logits.dtype == torch.float32
    assert logits.shape == (3, VOCAB_SIZE)
