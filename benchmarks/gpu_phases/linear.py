"""Phase 3: the INT4 linear layers beside cuBLAS in 16 bits, torch's int4 op and gemlite, in turn, shape by shape."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench, Item, Side
from benchmarks.gpu_phases.datasheet import MANY_ROWS, MANY_ROWS_GOAL, MAX_BANDWIDTH_ROWS, linear_bandwidth_goal
from benchmarks.gpu_phases.figures import Cell, Figure, Goal
from benchmarks.gpu_phases.linear_sides import Gemlite, HalfWeights, OurKernels, TorchInt4
from benchmarks.gpu_phases.machine import copy_bandwidth, data_sheet
from benchmarks.gpu_phases.operands import random_rows, random_weight
from benchmarks.gpu_phases.sizes import HALF_TYPES, LinearCase
from benchmarks.gpu_phases.stopwatch import Timing
from kernels import reference

PHASE = "linear"
OURS, CUBLAS, TORCH_INT4, GEMLITE = "ours", "cuBLAS", "torch int4", "gemlite"
SHARE_OF_COPY = "% of copy"
RATIO_TO_CUBLAS = "cuBLAS / ours"
ROWS = "rows"
PEER_TABLE = "Peers that can be compared with"
USABLE = "usable"
# of bfloat16 scales and products
MAX_PEER_ERROR = 0.02
# from here on arithmetic decides
FLOPS_ROWS = 128


def plan(bench: Bench) -> Sequence[Item]:
    cases = [Item(str(case), partial(_measure, bench, case)) for case in bench.sizes.linear]
    peers = [Item("torch int4 against the reference", partial(_check_torch_int4, bench))]
    return [
        *peers,
        *cases,
        *(Item(f"gemlite, {case}", partial(_measure_gemlite, bench, case)) for case in bench.sizes.gemlite),
    ]


def _check_torch_int4(bench: Bench) -> Iterator[Figure]:
    """Whether the op runs here and means by its operands what we give it; without, it is no peer."""
    case = bench.sizes.linear[0]
    row_major = random_weight(bench, case.shape, case.group_size, seed=1)
    x = random_rows(bench, (1, case.shape.num_inputs), torch.bfloat16, seed=2)
    (out, *_) = (call() for call in TorchInt4(bench, row_major).side(x).calls)
    if not isinstance(out, Tensor):
        raise TypeError(f"torch's int4 op returns {type(out).__name__}")
    expected = reference.quantized_linear(x, row_major).float()
    error = float((out.float() - expected).norm() / expected.norm())
    yield Figure(PEER_TABLE, TORCH_INT4, {"relative error": error, USABLE: error < MAX_PEER_ERROR})


def _is_usable(bench: Bench, peer: str) -> bool:
    return any(figure.name == peer and figure.values.get(USABLE) is True for figure in bench.findings.of(PHASE))


def _measure(bench: Bench, case: LinearCase) -> Iterator[Figure]:
    row_major = random_weight(bench, case.shape, case.group_size, seed=1)
    ours = OurKernels(bench, row_major)
    half = HalfWeights(bench, row_major, HALF_TYPES[case.dtype])
    int4 = TorchInt4(bench, row_major) if _is_usable(bench, TORCH_INT4) else None
    for num_rows in case.rows:
        x = random_rows(bench, (num_rows, case.shape.num_inputs), HALF_TYPES[case.dtype], seed=num_rows)
        sides = {OURS: ours.side(x), CUBLAS: half.side(x)}
        if int4 is not None and num_rows <= bench.sizes.int4_peer_rows:
            sides[TORCH_INT4] = int4.side(x)
        yield _figure(bench, case, x, ours.num_bytes, bench.time(sides))


def _measure_gemlite(bench: Bench, case: LinearCase) -> Iterator[Figure]:
    row_major = random_weight(bench, case.shape, case.group_size, seed=1)
    peer, ours = Gemlite(bench, row_major), OurKernels(bench, row_major)
    for num_rows in case.rows:
        x = random_rows(bench, (num_rows, case.shape.num_inputs), HALF_TYPES[case.dtype], seed=num_rows)
        sides: Mapping[str, Side] = {OURS: ours.side(x), GEMLITE: peer.side(x)}
        timings = bench.time(sides)
        yield Figure(
            "Linear layers beside gemlite",
            f"{case}, {num_rows} rows",
            {
                "ours us": 1e6 * timings[OURS].median,
                "gemlite us": 1e6 * timings[GEMLITE].median,
                "gemlite / ours": timings[GEMLITE].median / timings[OURS].median,
            },
        )


def _figure(bench: Bench, case: LinearCase, x: Tensor, weight_bytes: int, timings: Mapping[str, Timing]) -> Figure:
    num_rows, (num_columns, num_inputs) = len(x), (case.shape.num_columns, case.shape.num_inputs)
    ours, cublas = timings[OURS], timings[CUBLAS]
    # what must be read and written, whoever computes it
    num_bytes = weight_bytes + x.element_size() * num_rows * (num_inputs + num_columns)
    share = num_bytes / ours.median / copy_bandwidth(bench)
    sheet = data_sheet(bench)
    flops = 2 * num_rows * num_columns * num_inputs
    values: dict[str, Cell] = {
        ROWS: num_rows,
        "ours us": 1e6 * ours.median,
        "p10": 1e6 * ours.p10,
        "p90": 1e6 * ours.p90,
        "cuBLAS us": 1e6 * cublas.median,
        RATIO_TO_CUBLAS: cublas.median / ours.median,
        "torch int4 us": 1e6 * timings[TORCH_INT4].median if TORCH_INT4 in timings else None,
        "torch int4 / ours": timings[TORCH_INT4].median / ours.median if TORCH_INT4 in timings else None,
        "GB/s": num_bytes / ours.median / 1e9,
        SHARE_OF_COPY: 100 * share,
        "% of datasheet": None if sheet is None else 100 * num_bytes / ours.median / sheet.bytes_per_second,
        "TFLOP/s": flops / ours.median / 1e12 if num_rows >= FLOPS_ROWS else None,
        "cuBLAS TFLOP/s": flops / cublas.median / 1e12 if num_rows >= FLOPS_ROWS else None,
    }
    return Figure("Linear layers", str(case), values, _goals(bench, num_rows, share, cublas.median / ours.median))


def _goals(bench: Bench, num_rows: int, share: float, ratio: float) -> tuple[Goal, ...]:
    if num_rows <= MAX_BANDWIDTH_ROWS:
        return (Goal("share of copy bandwidth", share, linear_bandwidth_goal(bench.architecture)),)
    if num_rows > MANY_ROWS:
        return (Goal("speed of cuBLAS", ratio, MANY_ROWS_GOAL),)
    return ()
