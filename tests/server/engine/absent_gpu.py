"""What an engine would compile for a GPU that is not there: a program.

`python -m tests.server.engine.absent_gpu DIRECTORY ADAPTER [DIRECTORY ADAPTER ...]` prints JSON: of each model the
names of the kernels that its warm-up finds, of those that random steps need besides, and of those that are left when
two have been compiled. ADAPTER is a directory, or empty.
"""

import json
import random
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import kernels.launch

ARCH = 90
# before the modules that ask for it are imported
kernels.launch.launch_arch = lambda operands: ARCH

from kernels.paged_batch import allocate_layer  # noqa: E402
from kernels.parallel_compile import NeededKernel, compile_kernels, find_needed_kernels  # noqa: E402
from server.engine.model_runner import ModelRunner  # noqa: E402
from server.engine.request import SamplingParams  # noqa: E402
from server.engine.step_plan import SamplingRow, StepPlan  # noqa: E402
from server.engine.warm_up import WarmUpLimits, warm_up_plans  # noqa: E402
from server.model.adapter import open_adapter  # noqa: E402
from server.model.config import read_model_config  # noqa: E402
from server.model.loader import load_model  # noqa: E402

CPU = torch.device("cpu")
BLOCK_SIZE = 16
NUM_BLOCKS = 64
COMPILED = ("silu_gate_kernel", "gather_rows_kernel")


class AbsentGpu:
    """As much of Triton's driver as is asked before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def random_plan(rng: random.Random, limits: WarmUpLimits) -> StepPlan:
    """A step such as a scheduler makes: prompts, parts of prompts and decoding, and what requests ask for."""
    lens: list[int] = []
    while len(lens) < rng.choice((1, 2, 5, limits.max_num_seqs)):
        lens.append(rng.choice((1, 1, 1, 2, 7, rng.randint(1, 200))))
    cached = [rng.randint(0, limits.max_model_len - length) for length in lens]
    contexts = [before + length for before, length in zip(cached, lens, strict=True)]
    starts = np.cumsum([0, *lens], dtype=np.int32)
    rows = []
    for stop, context in zip(starts[1:].tolist(), contexts, strict=True):
        if rng.random() < 0.8:
            params = SamplingParams(
                max_tokens=5,
                temperature=rng.choice((0.0, 1.0)),
                top_k=rng.choice((0, 1, 16, 50)),
                top_p=rng.choice((1.0, 0.5)),
                logprobs=rng.choice((None, 0, 1, 5, 16)),
                logit_bias=rng.choice(((), ((3, 1.0), (4, -1.0)))),
                repetition_penalty=rng.choice((1.0, 1.5)),
            )
            mask = np.full(-(-limits.vocab_size // 32), -1, dtype=np.int32)
            text = np.zeros(context, dtype=np.int64)
            allowed = mask if rng.random() < 0.1 else None
            rows.append(SamplingRow("", stop - 1, params, text, context, 1, allowed))
    has_adapters = limits.adapters and rng.random() < 0.5
    return StepPlan(
        request_ids=("",) * len(lens),
        token_ids=np.zeros(starts[-1], dtype=np.int64),
        positions=np.concatenate([np.arange(b, b + n, dtype=np.int64) for b, n in zip(cached, lens, strict=True)]),
        query_starts=starts,
        context_lens=np.array(contexts, dtype=np.int32),
        block_tables=np.zeros((len(lens), -(-max(contexts) // BLOCK_SIZE)), dtype=np.int32),
        sampling_rows=tuple(rows),
        adapters=tuple(rng.choice(("", *limits.adapters)) for _ in lens) if has_adapters else (),
    )


def find(directory: str, adapter: str, rng: random.Random) -> dict[str, object]:
    """What a model needs, with a cache in its own dtype and in codes. adapter: its directory, or nothing."""
    config = read_model_config(Path(directory))
    adapters = (open_adapter("mine", Path(adapter), config),) if adapter else ()
    model = load_model(Path(directory), CPU, torch.float16, lambda progress: None, adapters=adapters)
    names = tuple(adapter.name for adapter in adapters)
    limits = WarmUpLimits(40, 1500, 400, config.vocab_size, BLOCK_SIZE, names)
    needed: set[NeededKernel] = set()
    besides: set[NeededKernel] = set()
    for dtype in (torch.float16, torch.uint8):
        shape = (NUM_BLOCKS, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        layers = tuple(allocate_layer(*shape, dtype=dtype, device=CPU) for _ in range(config.num_layers))
        runner = ModelRunner(model.decoder, layers, adapters=names)
        found = find_needed_kernels(partial(execute_all, runner, warm_up_plans(limits)))
        plans = [random_plan(rng, limits) for _ in range(60)]
        besides |= {*find_needed_kernels(partial(execute_all, runner, plans))} - {*found}
        needed |= {*found}
    told: list[tuple[int, int]] = []
    some = {kernel.name: kernel for kernel in needed if kernel.name in COMPILED}
    compile_kernels(tuple(some.values()), 2, lambda num_done, num_all: told.append((num_done, num_all)))
    left = find_needed_kernels(partial(execute_all, runner, warm_up_plans(limits)))
    return {
        "needed": sorted(kernel.name for kernel in needed),
        "besides": sorted(kernel.name for kernel in besides),
        "left": sorted({kernel.name for kernel in left}),
        "told": told,
    }


def execute_all(runner: ModelRunner, plans: Iterable[StepPlan]) -> None:
    for plan in plans:
        runner.execute(plan)


def main(arguments: list[str]) -> None:
    driver.set_active(AbsentGpu())
    rng = random.Random(0)
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    sys.stdout.write(json.dumps([find(directory, adapter, rng) for directory, adapter in pairs]))


if __name__ == "__main__":
    main(sys.argv[1:])
