"""Phase 6: how long a block of a 7B model takes to quantize on the device, by each method."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_phases.bench import Bench, Item
from benchmarks.gpu_phases.figures import Figure
from quant.block import BlockPlan
from quant.block_groups import groups_of
from quant.block_search import OpenBlock, search_block
from quant.block_structure import BlockStructures
from quant.blockwise_model import BlockwiseModel, hold_nothing
from quant.device import peak_bytes
from quant.input_statistics import Streams
from quant.kept_states import KeptChunks
from quant.kept_tensors import Scratch
from quant.method import STEPS, Method
from quant.original_weights import HeldWeights
from quant.scale_groups import rows_of
from quant.scale_search import Grouping

PHASE = "quantize"
TABLE = "Quantizing one block"
METHODS = (Method.AWQ_GPTQ, Method.AWQ, Method.GPTQ)


def plan(bench: Bench) -> Sequence[Item]:
    return [Item(f"one block by {method}", partial(_quantize, bench, method)) for method in METHODS]


@torch.no_grad()
def _quantize(bench: Bench, method: Method) -> Iterator[Figure]:
    """The first block of a model of random weights, on random tokens: hidden states and weights are on the host, the
    block on the device, as when a model is quantized."""
    shape, (num_rows, row_tokens) = bench.sizes.quantized_model, bench.sizes.quantized_rows
    whole = LlamaForCausalLM(LlamaConfig.from_dict({**shape.to_config(row_tokens), "dtype": "float32"}))
    model = BlockwiseModel(whole, HeldWeights(hold_nothing(whole)), bench.device)
    ((name, skeleton),) = model.stack.blocks.items()
    group_size = 128 if shape.hidden_size % 128 == 0 and shape.intermediate_size % 128 == 0 else 32
    plan = BlockPlan(groups_of(skeleton, rows_of("llama"), whole.config), Grouping(4, group_size), STEPS[method])
    inputs = KeptChunks(Scratch(), model.embed(torch.randint(shape.vocab_size, (num_rows, row_tokens))))
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    started = time.perf_counter()
    block = model.load_block(0)
    bench.stopwatch.wait()
    loaded = time.perf_counter()
    # found out once for all blocks of a model
    plan = BlockStructures().complete(plan, block, 0, inputs[0])
    bench.stopwatch.wait()
    began = time.perf_counter()
    opened = OpenBlock(block, name, 0, partial(model.restore_block, block, 0))
    outcome = search_block(opened, Streams(inputs, inputs), plan, Scratch())
    bench.stopwatch.wait()
    seconds = time.perf_counter() - began
    peak = peak_bytes(bench.device)
    values = {
        "seconds": seconds,
        "seconds to load": loaded - started,
        **({} if peak is None else {"peak memory (GB)": peak / 1e9}),
        "million weights": sum(weight.shape[0] * weight.shape[1] for weight in outcome.packed.values()) / 1e6,
        "calibration tokens": num_rows * row_tokens,
        "error, plain rounding": outcome.error.plain,
        "error now": outcome.error.chosen,
    }
    yield Figure(TABLE, f"{method}, {shape.hidden_size} wide", values)
