"""Phase 6: how long a block of a 7B model takes to quantize on the device, by each method."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_phases.bench import Bench, Item
from benchmarks.gpu_phases.figures import Figure
from quant.block import BlockPlan
from quant.block_groups import groups_of
from quant.block_search import OpenBlock, search_block
from quant.capture import embed
from quant.input_statistics import Streams
from quant.kept_tensors import Scratch
from quant.method import STEPS, Method
from quant.model_structure import find_blocks
from quant.scale_groups import rows_of
from quant.scale_search import Grouping

PHASE = "quantize"
TABLE = "Quantizing one block"
METHODS = (Method.AWQ_GPTQ, Method.AWQ, Method.GPTQ)


def plan(bench: Bench) -> Sequence[Item]:
    return [Item(f"one block by {method}", partial(_quantize, bench, method)) for method in METHODS]


def _copy_again(block: nn.Module, weights: Mapping[str, Tensor], names: Collection[str]) -> None:
    with torch.no_grad():
        for name in names:
            block.get_parameter(name).copy_(weights[name])


def _quantize(bench: Bench, method: Method) -> Iterator[Figure]:
    """The first block of a model of random weights, on random tokens. The quantizer makes its own tensors where torch
    makes them unless told otherwise: here that is the device."""
    shape, (num_rows, row_tokens) = bench.sizes.quantized_model, bench.sizes.quantized_rows
    with torch.device(bench.device):
        model = LlamaForCausalLM(LlamaConfig.from_dict({**shape.to_config(row_tokens), "dtype": "float32"}))
        stack = find_blocks(model)
        ((name, block),) = stack.blocks.items()
        groups = groups_of(block, rows_of("llama"), model.config)
        group_size = 128 if shape.hidden_size % 128 == 0 and shape.intermediate_size % 128 == 0 else 32
        tokens = torch.randint(shape.vocab_size, (num_rows, row_tokens))
        inputs = list(embed(stack, tokens))
        weights = {own: parameter.detach().clone() for own, parameter in block.named_parameters()}
        opened = OpenBlock(block, name, 0, partial(_copy_again, block, weights))
        bench.stopwatch.wait()
        started = time.perf_counter()
        plan = BlockPlan(groups, Grouping(4, group_size), STEPS[method])
        outcome = search_block(opened, Streams(inputs, inputs), plan, Scratch())
        bench.stopwatch.wait()
        seconds = time.perf_counter() - started
    num_weights = sum(weight.shape[0] * weight.shape[1] for weight in outcome.packed.values())
    values = {
        "seconds": seconds,
        "million weights": num_weights / 1e6,
        "calibration tokens": num_rows * row_tokens,
        "error, plain rounding": outcome.error.plain,
        "error now": outcome.error.chosen,
    }
    yield Figure(TABLE, f"{method}, {shape.hidden_size} wide", values)
