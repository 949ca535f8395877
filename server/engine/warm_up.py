"""What an engine does before it is ready, so that no request waits for a compiler: steps of every kind, for nobody.

Kernels are chosen by the number of rows, by what rows ask of the sampler and by whether there are adapters. Every step
reads and writes block 0, which holds nothing yet.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from server.engine.model_runner import ModelRunner
from server.engine.out_of_memory import execute_within_memory
from server.engine.request import SamplingParams
from server.engine.step_plan import PromptLogprobRows, SamplingRow, StepPlan
from server.model.loader import LoadProgress

_MAX_COMPILING_THREADS = 16
_MASK_BITS = 32


@dataclass(frozen=True)
class WarmUpLimits:
    """What the steps of the engine may hold. adapters: the names that requests may choose."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int
    block_size: int
    adapters: tuple[str, ...] = ()


def warm_up(runners: Sequence[tuple[ModelRunner, WarmUpLimits]], report: Callable[[LoadProgress], None]) -> None:
    """Compile what the runners' steps may launch, on all cores, and run steps of each kind once."""
    # it loads Triton, so only where there is a GPU
    from kernels.parallel_compile import compile_kernels, find_needed_kernels

    steps = [(runner, plan) for runner, limits in runners for plan in warm_up_plans(limits)]

    def run_all() -> None:
        for runner, plan in steps:
            # a step that the device has no memory for is made smaller when there are requests
            execute_within_memory(runner, plan)

    compile_kernels(
        find_needed_kernels(run_all),
        min(len(os.sched_getaffinity(0)), _MAX_COMPILING_THREADS),
        lambda num_done, num_all: report(LoadProgress(num_done, num_all, "compiling kernel")),
    )
    run_all()


def warm_up_plans(limits: WarmUpLimits) -> tuple[StepPlan, ...]:
    """Steps that launch all that a step within these limits may launch.

    Prompts and decoding of 1, 2, 4, ... rows, as each tile is for rows up to a power of two, or for more than the
    largest; then one row for everything that can be asked of the sampler, and one for each adapter.
    """
    num_tokens = min(limits.max_num_batched_tokens, limits.max_model_len)
    plans = [_plan(limits, [length]) for length in _doubling(num_tokens)]
    plans += [_plan(limits, [1] * num_seqs) for num_seqs in _doubling(limits.max_num_seqs)]
    if limits.max_num_batched_tokens > num_tokens:
        # of several prompts, as one cannot be so long
        plans.append(
            _plan(limits, [num_tokens] * min(limits.max_num_batched_tokens // num_tokens, limits.max_num_seqs))
        )
    one = _plan(limits, [1])
    plans += [_ask(one, limits, *asked) for asked in product((False, True), repeat=3)]
    scores = PromptLogprobRows("", 0, np.zeros(1, dtype=np.int64), 1)
    plans.append(replace(one, prompt_logprob_rows=(scores,)))
    plans += [replace(one, adapters=(name,)) for name in limits.adapters]
    return tuple(plans)


def _doubling(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def _plan(limits: WarmUpLimits, lens: list[int]) -> StepPlan:
    """Sequences of so many tokens, all of them new, each of which draws a token by chance."""
    starts = np.cumsum([0, *lens], dtype=np.int32)
    text = np.zeros(max(lens), dtype=np.int64)
    params = SamplingParams(max_tokens=1, temperature=1.0, top_k=2, top_p=0.5, logprobs=1)
    return StepPlan(
        request_ids=("",) * len(lens),
        token_ids=np.zeros(starts[-1], dtype=np.int64),
        positions=np.concatenate([np.arange(length, dtype=np.int64) for length in lens]),
        query_starts=starts,
        context_lens=np.array(lens, dtype=np.int32),
        block_tables=np.zeros((len(lens), -(-max(lens) // limits.block_size)), dtype=np.int32),
        sampling_rows=tuple(
            SamplingRow("", stop - 1, params, text, length, length)
            for stop, length in zip(starts[1:].tolist(), lens, strict=True)
        ),
    )


def _ask(plan: StepPlan, limits: WarmUpLimits, has_bias: bool, has_penalty: bool, has_mask: bool) -> StepPlan:  # noqa: FBT001
    """A step of one row that asks these things of the sampler."""
    (row,) = plan.sampling_rows
    params = replace(
        row.params,
        logit_bias=((0, 1.0),) if has_bias else (),
        presence_penalty=1.0 if has_penalty else 0.0,
    )
    mask = np.full(-(-limits.vocab_size // _MASK_BITS), -1, dtype=np.int32) if has_mask else None
    return replace(plan, sampling_rows=(row._replace(params=params, allowed=mask),))
