"""How far our decoder is from transformers in float32, on tiny random models of every family that is served.

Four ways through a sequence: in one step, in chunks, token by token, and in a step that it shares with sequences at
other stages, whose prefixes are in the cache. A figure is the largest difference of log-probabilities over all tokens.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.parity_models import PARITY_MODELS, VOCAB_SIZE, TinyModel, save_random_model
from kernels.paged_batch import allocate_layer
from server.engine.step_plan import StepPlan
from server.engine.step_tensors import build_step_tensors
from server.model.loader import ignore_load_progress, load_model

CPU = torch.device("cpu")
BLOCK_SIZE = 16
BLOCKS_PER_SEQUENCE = 4
# no multiple of a block, and longer than every window
LENGTHS = (61, 47, 20)
CHUNK_BOUNDS = (0, 5, 32, 33, 61)
# what is cached of each sequence before the step that they share: the last two then are decoded
CACHED = (30, 46, 19)
# both sum in float32, in another order; a value that is wrong is off by tenths
LIMIT = 1e-4


@dataclass(frozen=True)
class Span:
    """Tokens start .. stop of a sequence, of which those before start are in the cache."""

    sequence: int
    start: int
    stop: int


# each way is a list of steps, and a step a list of spans
WAYS: Mapping[str, Sequence[Sequence[Span]]] = {
    "one step": [[Span(0, 0, LENGTHS[0])]],
    "chunks": [[Span(0, start, stop)] for start, stop in pairwise(CHUNK_BOUNDS)],
    "token by token": [[Span(0, position, position + 1)] for position in range(LENGTHS[0])],
    "mixed batch": [
        *([Span(sequence, 0, cached)] for sequence, cached in enumerate(CACHED)),
        [Span(sequence, CACHED[sequence], LENGTHS[sequence]) for sequence in (1, 0, 2)],
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models of the table; left out: all of them")
    names = parser.parse_args(arguments).names or list(PARITY_MODELS)
    if unknown := set(names) - set(PARITY_MODELS):
        parser.error(f"there is no model {', '.join(sorted(unknown))}; there are {', '.join(PARITY_MODELS)}")
    # a bar for each of the tiny files would bury the table
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    table = Table("model", *WAYS, box=None)
    largest = 0.0
    for name in names:
        differences = measure(PARITY_MODELS[name])
        largest = max(largest, *differences.values())
        table.add_row(name, *(f"{difference:.1e}" for difference in differences.values()))
    Console().print(table)
    if largest > LIMIT:
        sys.stderr.write(f"error: {largest:.1e} is more than what the order of summation explains ({LIMIT:.0e})\n")
        return 1
    return 0


@torch.inference_mode()
def measure(model: TinyModel) -> dict[str, float]:
    """The largest difference of log-probabilities to transformers, by way."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]
    with tempfile.TemporaryDirectory() as directory:
        save_random_model(model.model_type, model.fields, Path(directory))
        theirs = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
        expected = [theirs(sequence[None]).logits[0].log_softmax(dim=-1) for sequence in sequences]
        return {way: _largest_difference(Path(directory), steps, sequences, expected) for way, steps in WAYS.items()}


def _largest_difference(
    directory: Path, steps: Sequence[Sequence[Span]], sequences: Sequence[Tensor], expected: Sequence[Tensor]
) -> float:
    model = load_model(directory, CPU, None, ignore_load_progress)
    config = model.config
    num_blocks = BLOCKS_PER_SEQUENCE * len(sequences)
    caches = [
        allocate_layer(num_blocks, config.num_kv_heads, BLOCK_SIZE, config.head_dim, dtype=torch.float32, device=CPU)
        for _ in range(config.num_layers)
    ]
    largest = 0.0
    for spans in steps:
        plan = _plan(spans, sequences)
        step = build_step_tensors(plan, range(len(spans)), BLOCK_SIZE, CPU, {})
        hidden = model.decoder.forward(step.token_ids, step.positions, step.batch, caches)
        found = model.decoder.compute_logits(hidden).log_softmax(dim=-1)
        wanted = torch.cat([expected[span.sequence][span.start : span.stop] for span in spans])
        largest = max(largest, float((found - wanted).abs().max()))
    return largest


def _plan(spans: Sequence[Span], sequences: Sequence[Tensor]) -> StepPlan:
    tables = [range(span.sequence * BLOCKS_PER_SEQUENCE, (span.sequence + 1) * BLOCKS_PER_SEQUENCE) for span in spans]
    return StepPlan(
        request_ids=tuple(str(span.sequence) for span in spans),
        token_ids=torch.cat([sequences[span.sequence][span.start : span.stop] for span in spans]).numpy(),
        positions=np.concatenate([np.arange(span.start, span.stop) for span in spans]),
        query_starts=np.cumsum([0, *(span.stop - span.start for span in spans)], dtype=np.int32),
        context_lens=np.array([span.stop for span in spans], dtype=np.int32),
        block_tables=np.array(tables, dtype=np.int32),
        sampling_rows=(),
    )


if __name__ == "__main__":
    sys.exit(main())
