"""Phase 2: every kernel against plain torch in high precision, each twice, and rows that feel no neighbours."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench, Item
from benchmarks.gpu_phases.correctness_attention import attention_items
from benchmarks.gpu_phases.correctness_experts import expert_items
from benchmarks.gpu_phases.figures import Figure
from benchmarks.gpu_phases.operands import prepare_for_kernels, random_rows, random_weight
from benchmarks.gpu_phases.sizes import HALF_TYPES, HalfName, LinearShape
from benchmarks.gpu_phases.verdicts import LAST_PLACE, same_bits, share_of_allowed, verdict
from kernels import cpu, dispatch, reference
from kernels.dispatch import MAX_GEMV_ROWS
from kernels.gemm_int4 import gemm_int4
from kernels.gemv_int4 import gemv_int4
from kernels.layout import PackedWeight

PHASE = "correctness"
NUMBERS_TABLE = "Linear layers against float64"
SAME_BITS_TABLE = "The same bits in every batch"
Linear = Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
KERNELS: dict[str, Linear] = {"few rows": gemv_int4, "many rows": gemm_int4}


def plan(bench: Bench) -> Sequence[Item]:
    sizes = bench.sizes
    first, *others = [
        Item(f"linear {dtype} g{group}", partial(_check_linear, bench, dtype, group))
        for group in sizes.checked_groups
        for dtype in HALF_TYPES
    ]
    invariance = [
        Item(f"same bits {dtype} {shape}", partial(_check_same_bits, bench, dtype, shape))
        for dtype in HALF_TYPES
        for shape in sizes.invariant_shapes
    ]
    rest = [
        Item("values that are not finite", partial(_check_not_finite, bench)),
        Item("norm", partial(_check_norm, bench)),
    ]
    # a little of everything first, should time run out
    attention, experts = attention_items(bench), expert_items(bench)
    return [first, *invariance[:1], *attention[:1], *others, *invariance[1:], *rest, *attention[1:], *experts]


def _check_linear(bench: Bench, dtype: HalfName, group_size: int) -> Iterator[Figure]:
    for shape in bench.sizes.checked_shapes:
        if shape.num_inputs % group_size:
            continue
        row_major = random_weight(bench, shape, group_size, seed=group_size)
        weight = prepare_for_kernels(row_major, bench)
        exact = reference.dequantize(row_major).double()
        bias = random_rows(bench, (shape.num_columns,), HALF_TYPES[dtype], seed=1)
        for kernel_name, kernel in KERNELS.items():
            worst, is_repeated, worst_rows = 0.0, True, 0
            for num_rows in bench.sizes.checked_rows:
                if kernel is gemv_int4 and num_rows > MAX_GEMV_ROWS:
                    continue
                x = random_rows(bench, (num_rows, shape.num_inputs), HALF_TYPES[dtype], seed=num_rows)
                out, again = kernel(x, weight, bias), kernel(x, weight, bias)
                share = _share_of_allowed(out, x, exact, bias)
                if not share <= worst:
                    worst, worst_rows = share, num_rows
                is_repeated &= same_bits(out, again)
            yield verdict(
                NUMBERS_TABLE,
                f"{kernel_name}, {shape} g{group_size} {dtype}",
                {"error / allowed": worst, "at rows": worst_rows, "twice the same bits": is_repeated},
                passed=worst <= 1 and is_repeated,
            )


def _share_of_allowed(out: Tensor, x: Tensor, exact: Tensor, bias: Tensor) -> float:
    """The largest error as a share of what rounding explains."""
    expected = x.double() @ exact.T + bias.double()
    magnitudes = x.double().abs() @ exact.abs().T + bias.double().abs()
    return share_of_allowed(out, expected, magnitudes)


def _check_same_bits(bench: Bench, dtype: HalfName, shape: LinearShape) -> Iterator[Figure]:
    """Row i of every batch beside row i of the largest that the few-row kernel takes."""
    group_size = bench.sizes.checked_groups[0]
    if shape.num_inputs % group_size:
        group_size = bench.sizes.checked_groups[-1]
    weight = prepare_for_kernels(random_weight(bench, shape, group_size, seed=3), bench)
    most = max(bench.sizes.invariance_rows)
    x = random_rows(bench, (most, shape.num_inputs), HALF_TYPES[dtype], seed=4)
    expected = gemv_int4(x[:MAX_GEMV_ROWS], weight)
    for kernel_name, kernel in KERNELS.items():
        differing: list[str] = []
        for num_rows in bench.sizes.invariance_rows:
            if kernel is gemv_int4 and num_rows > MAX_GEMV_ROWS:
                continue
            num_compared = min(num_rows, MAX_GEMV_ROWS)
            out = kernel(x[:num_rows], weight, None)
            if not same_bits(out[:num_compared], expected[:num_compared]):
                differing.append(str(num_rows))
        yield verdict(
            SAME_BITS_TABLE,
            f"{kernel_name}, {shape} g{group_size} {dtype}",
            {"differs at rows": " ".join(differing) or "none"},
            passed=not differing,
        )


def _check_not_finite(bench: Bench) -> Iterator[Figure]:
    """An infinity or a NaN in a row changes all of its own outputs and no other row's."""
    shape = bench.sizes.checked_shapes[0]
    weight = prepare_for_kernels(random_weight(bench, shape, bench.sizes.checked_groups[-1], seed=5), bench)
    for kernel_name, kernel in KERNELS.items():
        for value in (float("inf"), float("nan")):
            x = random_rows(bench, (4, shape.num_inputs), torch.float16, seed=6)
            clean = kernel(x, weight, None)
            x[2, -1] = value
            out = kernel(x, weight, None)
            others = [0, 1, 3]
            is_kept = same_bits(out[others], clean[others]) and not bool(out[2].isfinite().any())
            yield verdict(SAME_BITS_TABLE, f"{kernel_name}, a row with {value}", {}, passed=is_kept)


def _check_norm(bench: Bench) -> Iterator[Figure]:
    for name, dtype in HALF_TYPES.items():
        x = random_rows(bench, (17, bench.sizes.model.hidden_size), dtype, seed=7)
        weight = random_rows(bench, (bench.sizes.model.hidden_size,), dtype, seed=8)
        out, expected = dispatch.rms_norm(x, weight, 1e-5), cpu.rms_norm(x.float(), weight.float(), 1e-5)
        # normalized and multiplied in float32, or rounded between the two
        share = float(((out.float() - expected).abs() / (2 * LAST_PLACE[dtype] * expected.abs() + 1e-6)).max())
        yield verdict(NUMBERS_TABLE, f"norm {name}", {"error / allowed": share}, passed=share <= 1)
