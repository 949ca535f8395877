"""Greedy tokens of tiny models on the CPU's memory: also a program, for a process of its own that interprets Triton.

`python -m tests.server.model.greedy_tokens DTYPE SEED DIRECTORY [SEED DIRECTORY ...]` prints JSON: the tokens of each
model, and the names of the modules with kernels that were loaded.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.paged_batch import PagedLayer
from server.model.loader import LoadedModel, load_model
from tests.paged_cache import Chunk, build_batch, build_positions
from tests.tiny_models import VOCAB_SIZE

BLOCK_SIZE = 16
PROMPT_LENS = (26, 1, 9)
BLOCKS_PER_SEQUENCE = 3
NUM_NEW_TOKENS = 3


@dataclass(frozen=True)
class Generated:
    """tokens: the new ones of each prompt. margin: by how much the likeliest logit led where its lead was smallest."""

    tokens: list[list[int]]
    margin: float


def generate(directory: Path, dtype: torch.dtype, prompt_seed: int) -> Generated:
    """Random prompts of different lengths in one step, then token by token together."""
    model = load_model(directory, torch.device("cpu"), dtype, lambda progress: None)
    config = model.config
    shape = (BLOCKS_PER_SEQUENCE * len(PROMPT_LENS), config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    kv_layers = [
        PagedLayer(*(torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))) for _ in range(config.num_layers)
    ]
    generator = torch.Generator().manual_seed(prompt_seed)
    texts = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in PROMPT_LENS]
    num_cached = [0] * len(texts)
    margins = []
    for _ in range(NUM_NEW_TOKENS):
        new = [text[cached:] for text, cached in zip(texts, num_cached, strict=True)]
        num_cached = [len(text) for text in texts]
        likeliest = _last_logits(model, new, num_cached, kv_layers).topk(2, dim=-1)
        margins.append(float(likeliest.values.diff(dim=-1).abs().min()))
        texts = [torch.cat((text, token[:1])) for text, token in zip(texts, likeliest.indices, strict=True)]
    return Generated([text[-NUM_NEW_TOKENS:].tolist() for text in texts], min(margins))


def _last_logits(
    model: LoadedModel, new: Sequence[Tensor], lens: Sequence[int], kv_layers: Sequence[PagedLayer]
) -> Tensor:
    """Logits [B, vocab] after each sequence, of which `new` is what is not in the cache."""
    chunks = [
        Chunk(range(index * BLOCKS_PER_SEQUENCE, (index + 1) * BLOCKS_PER_SEQUENCE), length - len(tokens), len(tokens))
        for index, (tokens, length) in enumerate(zip(new, lens, strict=True))
    ]
    batch = build_batch(chunks, BLOCK_SIZE)
    with torch.inference_mode():
        hidden = model.decoder.forward(torch.cat(list(new)), build_positions(chunks), batch, kv_layers)
        return model.decoder.compute_logits(hidden[batch.query_starts[1:].long() - 1])


if __name__ == "__main__":
    dtype, *asked = sys.argv[1:]
    generated = [
        generate(Path(directory), getattr(torch, dtype), int(seed)).tokens
        for seed, directory in zip(asked[::2], asked[1::2], strict=True)
    ]
    sys.stdout.write(json.dumps({"tokens": generated, "modules": [name for name in sys.modules if "kernels." in name]}))
