"""What a decoding step costs the CPU around the model: planning, applying, tensors and messages, with a fake device.

The runner answers at once, so what is timed is the scheduler's own work. Goal: under 100 microseconds a step and 2 a
sequence for planning and applying.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import EXIT_INTERRUPTED, announce, positive_number, writable_file
from benchmarks.json_file import write_json
from benchmarks.machine import measure_busy_cores
from server.engine import messages
from server.engine.block_pool import BlockPool
from server.engine.graph_sizes import GraphSize
from server.engine.request import EngineNews, GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.static_step import StaticStep, num_words
from server.engine.step_plan import SampledToken, StepPlan, StepResult
from server.engine.step_tensors import build_step_tensors

BATCHES = (1, 8, 64, 256)
BLOCK_SIZE = 16
PROMPT_TOKENS = 512
STEP_GOAL, SEQUENCE_GOAL = 100.0, 2.0
MICROSECONDS = 1e6


@dataclass(frozen=True)
class StepCost:
    """Microseconds of one step that decodes num_sequences.

    Steps repeat after a block's tokens: as many sequences need a new block, or end one. So each of these steps counts
    with the lowest time of its repeats, which other programs did not disturb, and a part is the mean of them.
    """

    num_sequences: int
    plan: float
    apply: float
    tensors: float
    operands: float
    messages: float

    @property
    def scheduling(self) -> float:
        return self.plan + self.apply

    @property
    def waiting(self) -> float:
        """What a device that replays graphs waits for between two steps, launching aside."""
        return self.apply + self.messages + self.plan + self.operands


def measure(num_sequences: int, num_repeats: int) -> StepCost:
    """Decode that many sequences for num_repeats blocks after their prompts."""
    max_tokens = (num_repeats + 1) * BLOCK_SIZE
    num_blocks = num_sequences * (-(-(PROMPT_TOKENS + BLOCK_SIZE + max_tokens) // BLOCK_SIZE))
    limits = SchedulerLimits(num_sequences, num_sequences * (PROMPT_TOKENS + BLOCK_SIZE))
    scheduler = Scheduler(limits, BlockPool(num_blocks, BLOCK_SIZE))
    for index in range(num_sequences):
        # prompts of different lengths, so that not all sequences need a block in the same step
        length = PROMPT_TOKENS + index % BLOCK_SIZE
        prompt = tuple((index * 7919 + 31 * place) % 32_000 for place in range(length))
        scheduler.add(GenerationRequest(f"cmpl-{index:032x}-0", prompt, SamplingParams(max_tokens=max_tokens)))
    step = static_step(num_sequences, -(-(PROMPT_TOKENS + BLOCK_SIZE + max_tokens) // BLOCK_SIZE) * BLOCK_SIZE)
    _time_step(scheduler, step)
    # as the engine's process does when it has loaded
    gc.collect()
    gc.freeze()
    # [repeats, steps of a block, parts]
    seconds = np.array([[_time_step(scheduler, step) for _ in range(BLOCK_SIZE)] for _ in range(num_repeats)])
    return StepCost(num_sequences, *(seconds.min(axis=0).mean(axis=0) * MICROSECONDS).tolist())


def static_step(num_sequences: int, context_len: int) -> StaticStep:
    """The operands of a recorded step, with memory of the host's in the place of the device's."""
    size = GraphSize(num_sequences, context_len)
    words = torch.zeros(num_words(size, BLOCK_SIZE), dtype=torch.int32)
    query_starts = torch.arange(num_sequences + 1, dtype=torch.int32)
    return StaticStep(size, words, query_starts, BLOCK_SIZE, scratch_block=0)


def _time_step(scheduler: Scheduler, step: StaticStep) -> tuple[float, float, float, float, float]:
    """Seconds of planning, applying, tensors, operands and messages of one step."""
    started = perf_counter()
    plan = scheduler.plan_step()
    planned = perf_counter()
    assert plan is not None
    build_step_tensors(plan, range(len(plan.request_ids)), BLOCK_SIZE, torch.device("cpu"), {})
    built = perf_counter()
    # the first step reads prompts
    if len(plan.token_ids) == len(plan.request_ids):
        step.fill(plan, range(len(plan.request_ids)))
    filled = perf_counter()
    result = _answer(plan)
    answered = perf_counter()
    events = scheduler.apply(plan, result)
    applied = perf_counter()
    messages.encode(messages.News(EngineNews((), tuple(events), scheduler.stats())))
    encoded = perf_counter()
    return planned - started, applied - answered, built - planned, filled - built, encoded - applied


def _answer(plan: StepPlan) -> StepResult:
    return StepResult(tuple(SampledToken(7) for _ in plan.sampling_rows))


def fit(costs: Sequence[StepCost], values: Sequence[float]) -> tuple[float, float]:
    """The line a + b * sequences through the values: microseconds a step, and a sequence. Weighed by relative error."""
    counts = np.array([cost.num_sequences for cost in costs], dtype=np.float64)
    slope, constant = np.polyfit(counts, np.array(values), 1, w=1 / np.array(values))
    return float(constant), float(slope)


def render(costs: Sequence[StepCost]) -> Table:
    table = Table(title="microseconds of a step that decodes, the device left out", title_justify="left")
    table.add_column("sequences", justify="right")
    for name in ("plan", "apply", "plan + apply", "step tensors", "graph operands", "messages", "GPU waits"):
        table.add_column(name, justify="right")
    for cost in costs:
        parts = (
            cost.plan,
            cost.apply,
            cost.scheduling,
            cost.tensors,
            cost.operands,
            cost.messages,
            cost.waiting,
        )
        table.add_row(str(cost.num_sequences), *(f"{part:.0f}" for part in parts))
    columns = (
        [cost.plan for cost in costs],
        [cost.apply for cost in costs],
        [cost.scheduling for cost in costs],
        [cost.tensors for cost in costs],
        [cost.operands for cost in costs],
        [cost.messages for cost in costs],
        [cost.waiting for cost in costs],
    )
    fits = [fit(costs, column) for column in columns]
    table.add_section()
    table.add_row("a step", *(f"{constant:.0f}" for constant, _ in fits))
    table.add_row("a sequence", *(f"{slope:.2f}" for _, slope in fits))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where planning and applying miss the goal."""
    options = _parser().parse_args(arguments)
    busy_before = measure_busy_cores()
    try:
        costs = []
        for num_sequences in BATCHES:
            announce(f"{num_sequences} sequences")
            costs.append(measure(num_sequences, options.repeats))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    Console().print(render(costs))
    print(f"other programs kept {busy_before:.1f} cores busy before")
    constant, slope = fit(costs, [cost.scheduling for cost in costs])
    if options.json is not None:
        write_json(
            options.json,
            {"costs": [asdict(cost) for cost in costs], "step": constant, "sequence": slope},
        )
    return int(constant > STEP_GOAL or slope > SEQUENCE_GOAL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=positive_number, default=80, help="of each step, the fastest of which counts; default: 80"
    )
    parser.add_argument("--json", type=writable_file, help="a file for the figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
