"""Phase 5: a whole model: tokens a second beside what the memory's bandwidth allows, and beside its parts alone."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial

import torch

from benchmarks.gpu_phases.bench import Bench, Item
from benchmarks.gpu_phases.datasheet import END_TO_END_GOAL
from benchmarks.gpu_phases.decode_step import DecodeStep
from benchmarks.gpu_phases.engine_run import EngineRun, engine_block_size
from benchmarks.gpu_phases.figures import Cell, Figure, Goal
from benchmarks.gpu_phases.machine import copy_bandwidth, data_sheet
from benchmarks.gpu_phases.operands import Sequences, batch_of, random_cache
from benchmarks.gpu_phases.random_model import build_random_model, flops_per_token, weight_bytes
from benchmarks.gpu_phases.sizes import HeadShape
from benchmarks.gpu_phases.stopwatch import Timing
from server.model.loader import LoadedModel

PHASE = "end_to_end"
DECODE_TABLE, PREFILL_TABLE, ENGINE_TABLE = "Decoding, one captured step", "Reading a prompt", "The whole engine"
TOKENS_PER_SECOND, FLOOR = "tokens/s", "roofline tokens/s"
# eager steps, which wait for the host: few tell enough
NUM_EAGER_STEPS = 4
# runs of a step before the timed ones: one to compile, one to fill the queue
NUM_UNTIMED_STEPS = 2
# what an engine decodes of early prompts while it still reads the last ones
SPARE_TOKENS = 32
MILLI = 1e3


class _Models:
    """The model, made when the first item needs it and kept for the others."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    @cached_property
    def model(self) -> LoadedModel:
        sizes = self._bench.sizes
        return build_random_model(self._bench, sizes.model, self.max_tokens)

    @property
    def max_tokens(self) -> int:
        """The longest that a sequence gets."""
        sizes = self._bench.sizes
        return sizes.context_len + max(sizes.streams) + sizes.decode_steps + SPARE_TOKENS

    @property
    def block_size(self) -> int:
        return engine_block_size(self._bench, self.model)

    @cached_property
    def engine(self) -> EngineRun:
        return EngineRun(self._bench, self.model, max(self._bench.sizes.streams), self.max_tokens)


def plan(bench: Bench) -> Sequence[Item]:
    models = _Models(bench)
    context = bench.sizes.context_len
    return [
        *(
            Item(f"decode, {streams} x {context}", partial(_decode, bench, models, streams))
            for streams in bench.sizes.streams
        ),
        Item(f"prefill of {context}", partial(_prefill, bench, models)),
        *(
            Item(f"engine, {streams} x {context}", partial(_run_engine, bench, models, streams))
            for streams in bench.sizes.streams
        ),
    ]


def _decode(bench: Bench, models: _Models, num_streams: int) -> Iterator[Figure]:
    sizes, model = bench.sizes, models.model
    max_steps = NUM_UNTIMED_STEPS + sizes.decode_steps + NUM_EAGER_STEPS
    step = DecodeStep(bench, model, num_streams, sizes.context_len, max_steps, models.block_size)
    run = bench.stopwatch.prepare([step.run])
    whole = Timing.of(bench.stopwatch.compare({"step": run}, sizes.decode_steps)["step"])
    started = time.perf_counter()
    for _ in range(NUM_EAGER_STEPS):
        step.run()
    bench.stopwatch.wait()
    eager_seconds = (time.perf_counter() - started) / NUM_EAGER_STEPS
    parts = {
        "linears": bench.stopwatch.prepare(step.linear_calls()),
        "attention": bench.stopwatch.prepare(step.attention_calls()),
        "head": bench.stopwatch.prepare(step.head_calls()),
    }
    seconds = {
        name: Timing.of(values).median for name, values in bench.stopwatch.compare(parts, sizes.num_rounds).items()
    }
    # the head alone is timed with its weight in the cache where it fits; it never does for a real vocabulary
    num_bytes = _step_bytes(model, num_streams, sizes.context_len)
    share = sum(seconds.values()) / whole.median
    floor = num_streams * copy_bandwidth(bench) / num_bytes
    sheet = data_sheet(bench)
    values: dict[str, Cell] = {
        "streams": num_streams,
        TOKENS_PER_SECOND: num_streams / whole.median,
        FLOOR: floor,
        "% of roofline": 100 * num_streams / whole.median / floor,
        "datasheet roofline": None if sheet is None else num_streams * sheet.bytes_per_second / num_bytes,
        "step ms": MILLI * whole.median,
        "p10": MILLI * whole.p10,
        "p90": MILLI * whole.p90,
        **{f"{name} ms": MILLI * value for name, value in seconds.items()},
        "rest ms": MILLI * (whole.median - sum(seconds.values())),
        "eager step ms": MILLI * eager_seconds,
    }
    name = f"{num_streams} x {sizes.context_len}, {_how(bench)}"
    yield Figure(DECODE_TABLE, name, values, (Goal("share of what the parts allow", share, END_TO_END_GOAL),))


def _how(bench: Bench) -> str:
    return "CUDA graph" if bench.device.type == "cuda" else "CPU kernels"


def _step_bytes(model: LoadedModel, num_streams: int, context_len: int) -> int:
    """What a step must read: weights, head, and the cache of every sequence."""
    config = model.config
    kv_width = 2 * config.num_kv_heads * config.head_dim * model.decoder.embedding.element_size()
    return weight_bytes(config) + num_streams * context_len * config.num_layers * kv_width


def _prefill(bench: Bench, models: _Models) -> Iterator[Figure]:
    """All tokens of a prompt in one step, without the head."""
    model, num_tokens = models.model, bench.sizes.context_len
    config = model.config
    sequences = Sequences((0,), (num_tokens,), models.block_size)
    batch = batch_of(sequences, bench.device)
    heads = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
    dtype = model.decoder.embedding.dtype
    layers = [
        random_cache(bench, heads, sequences.num_blocks, models.block_size, dtype, seed=index)
        for index in range(config.num_layers)
    ]
    positions = torch.arange(num_tokens, device=bench.device)
    token_ids = positions % config.vocab_size
    run = bench.stopwatch.prepare([partial(model.decoder.forward, token_ids, positions, batch, layers)])
    timing = Timing.of(bench.stopwatch.compare({"prefill": run}, bench.sizes.num_rounds)["prefill"])
    flops = num_tokens * flops_per_token(config)
    sheet = data_sheet(bench)
    values: dict[str, Cell] = {
        TOKENS_PER_SECOND: num_tokens / timing.median,
        "ms": MILLI * timing.median,
        "p10": MILLI * timing.p10,
        "p90": MILLI * timing.p90,
        "TFLOP/s of the linears": flops / timing.median / 1e12,
        "% of datasheet": None if sheet is None else 100 * flops / timing.median / sheet.half_flops,
    }
    yield Figure(PREFILL_TABLE, f"{num_tokens} tokens, {_how(bench)}", values)


def _run_engine(bench: Bench, models: _Models, num_streams: int) -> Iterator[Figure]:
    sizes = bench.sizes
    speeds = models.engine.run(num_streams, sizes.context_len, sizes.decode_steps)
    floor = num_streams * copy_bandwidth(bench) / _step_bytes(models.model, num_streams, sizes.context_len)
    values: dict[str, Cell] = {
        "streams": num_streams,
        TOKENS_PER_SECOND: speeds.decode_tokens_per_second,
        FLOOR: floor,
        "% of roofline": 100 * speeds.decode_tokens_per_second / floor,
        "prompt tokens/s": speeds.prompt_tokens_per_second,
    }
    yield Figure(ENGINE_TABLE, f"{num_streams} x {sizes.context_len}, as the server steps it", values)
