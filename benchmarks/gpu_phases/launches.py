"""One small launch of every kernel variant that the phases use, so that it is in Triton's cache when they come to it.

python -m benchmarks.gpu_phases.launches FIRST STEP: every STEP-th launch from FIRST on, in a process of its own.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import torch

from benchmarks.gpu_phases.bench import Bench
from benchmarks.gpu_phases.figures import Findings
from benchmarks.gpu_phases.operands import (
    Sequences,
    batch_of,
    prepare_for_kernels,
    random_cache,
    random_rows,
    random_weight,
)
from benchmarks.gpu_phases.sizes import FULL, HALF_TYPES, HalfName, HeadShape, LinearShape
from benchmarks.gpu_phases.stopwatch import make_stopwatch
from kernels.dispatch import MAX_GEMV_ROWS
from kernels.gemm_int4 import gemm_int4
from kernels.gemv_int4 import gemv_int4
from kernels.paged_attention import paged_attention
from kernels.write_kv import write_kv

# one in each bucket of kernels/tiles.py, and one for the kernel of many rows
ROWS = (1, 16, 32, 64, 65)
# K that is split over programs, and K that is not
SHAPES = (LinearShape("long", 128, 4096), LinearShape("short", 128, 512))

Launch = Callable[[], object]


def all_launches(bench: Bench) -> list[Launch]:
    """The most common first: a process that is late compiles what fewest wait for."""
    linear = [
        partial(_multiply, bench, dtype, group_size, shape, num_rows)
        for group_size, dtype in product(bench.sizes.checked_groups, HALF_TYPES)
        for shape, num_rows in product(SHAPES, ROWS)
    ]
    attention = [
        partial(_attend, bench, dtype, heads, block_size)
        for heads, dtype, block_size in product(_all_heads(bench), HALF_TYPES, bench.sizes.block_sizes)
    ]
    return [*linear, *attention]


def _all_heads(bench: Bench) -> Sequence[HeadShape]:
    return tuple(dict.fromkeys((*bench.sizes.checked_heads, *(case.heads for case in bench.sizes.attention))))


def _multiply(bench: Bench, dtype: HalfName, group_size: int, shape: LinearShape, num_rows: int) -> None:
    weight = prepare_for_kernels(random_weight(bench, shape, group_size, seed=1), bench)
    x = random_rows(bench, (num_rows, shape.num_inputs), HALF_TYPES[dtype], seed=2)
    for bias in (None, random_rows(bench, (shape.num_columns,), HALF_TYPES[dtype], seed=3)):
        if num_rows <= MAX_GEMV_ROWS:
            gemv_int4(x, weight, bias)
        else:
            gemm_int4(x, weight, bias)


def _attend(bench: Bench, dtype: HalfName, heads: HeadShape, block_size: int) -> None:
    """A batch that decodes one sequence and reads the prompt of another, after it was written."""
    sequences = Sequences(num_cached=(20, 0), num_new=(1, 40), block_size=block_size)
    batch = batch_of(sequences, bench.device)
    layer = random_cache(bench, heads, sequences.num_blocks, block_size, HALF_TYPES[dtype], seed=1)
    num_tokens = sum(sequences.num_new)
    query = random_rows(bench, (num_tokens, heads.num_heads, heads.width), HALF_TYPES[dtype], seed=2)
    keys, values = (
        random_rows(bench, (num_tokens, heads.num_kv_heads, heads.width), HALF_TYPES[dtype], seed=seed)
        for seed in (3, 4)
    )
    write_kv(keys, values, layer, batch.slot_mapping)
    paged_attention(query, layer, batch, softmax_scale=heads.width**-0.5)


def main(arguments: Sequence[str]) -> int:
    first, step = map(int, arguments)
    torch.set_grad_enabled(False)
    device = torch.device("cuda")
    bench = Bench(device, FULL, make_stopwatch(device), Findings())
    for launch in all_launches(bench)[first::step]:
        launch()
    bench.stopwatch.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
