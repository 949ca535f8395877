"""The checks of mixtures of experts: the choice, the rows by expert, their products, and a graph that replays any."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_phases.bench import Bench, Item
from benchmarks.gpu_phases.figures import Figure
from benchmarks.gpu_phases.operands import prepare_for_kernels, random_rows, random_weight
from benchmarks.gpu_phases.sizes import HALF_TYPES, HalfName
from benchmarks.gpu_phases.verdicts import same_bits, share_of_allowed, verdict
from kernels import reference
from kernels.experts import Routing, SortedRows, stack_experts
from kernels.fused_routing import route, sorted_by_expert
from kernels.gemm_int4 import gemm_int4
from kernels.grouped_dense import grouped_dense
from kernels.grouped_int4 import grouped_int4, sum_choices
from kernels.tiles import grouped_rows

TABLE = "Mixtures of experts"
NUM_EXPERTS = 8
NUM_CHOICES = 2


def expert_items(bench: Bench) -> Sequence[Item]:
    return [Item(f"experts {dtype}", partial(_check, bench, dtype)) for dtype in HALF_TYPES]


def _check(bench: Bench, dtype: HalfName) -> Iterator[Figure]:
    scene = _Scene(bench, dtype)
    for num_tokens in bench.sizes.checked_rows:
        yield scene.check_routing(num_tokens)
        yield scene.check_products(num_tokens)
    yield scene.check_replay()


class _Scene:
    """Experts of the first of the checked shapes, quantized and as the dense weights that they stand for."""

    def __init__(self, bench: Bench, dtype: HalfName) -> None:
        self._bench, self._dtype_name, self._dtype = bench, dtype, HALF_TYPES[dtype]
        self._shape, group_size = bench.sizes.checked_shapes[0], bench.sizes.checked_groups[0]
        row_major = [random_weight(bench, self._shape, group_size, seed=seed) for seed in range(NUM_EXPERTS)]
        self._weights = [prepare_for_kernels(weight, bench) for weight in row_major]
        self._packed = stack_experts(self._weights)
        self._exact = torch.stack([reference.dequantize(weight) for weight in row_major])
        self._dense = self._exact.to(self._dtype)

    def check_routing(self, num_tokens: int) -> Figure:
        logits = self._random((num_tokens, NUM_EXPERTS), seed=1)
        routing, expected = (one(logits, NUM_CHOICES, renormalized=True) for one in (route, reference.route))
        rows = grouped_rows(expected.experts.numel(), NUM_EXPERTS)
        plan, expected_plan = (
            one(expected.experts, NUM_EXPERTS, rows) for one in (sorted_by_expert, reference.sorted_by_expert)
        )
        is_same = {
            "experts": torch.equal(routing.experts, expected.experts),
            "weights": torch.allclose(routing.weights, expected.weights, rtol=1e-5),
            "order": torch.equal(plan.order, expected_plan.order),
            "tiles": torch.equal(plan.tile_rows, expected_plan.tile_rows),
        }
        return verdict(
            TABLE, f"routing of {num_tokens} tokens {self._dtype_name}", is_same, passed=all(is_same.values())
        )

    def check_products(self, num_tokens: int) -> Figure:
        routing, plan = self._route(self._random((num_tokens, NUM_EXPERTS), seed=2))
        x = self._random((num_tokens, self._shape.num_inputs), seed=3)
        out, again = grouped_int4(x, self._packed, plan), grouped_int4(x, self._packed, plan)
        experts = routing.experts.flatten()
        rows = x.repeat_interleave(NUM_CHOICES, dim=0)
        alone = torch.empty_like(out)
        for expert, weight in enumerate(self._weights):
            alone[experts == expert] = gemm_int4(rows[experts == expert], weight)
        errors = {
            "error / allowed": self._error(out, self._exact, rows, experts),
            "dense error / allowed": self._error(grouped_dense(x, self._dense, plan), self._dense, rows, experts),
        }
        is_kept = {"twice the same bits": same_bits(out, again), "alone the same bits": same_bits(out, alone)}
        passed = all(error <= 1 for error in errors.values()) and all(is_kept.values())
        return verdict(TABLE, f"{num_tokens} tokens {self._dtype_name}", {**errors, **is_kept}, passed=passed)

    def check_replay(self) -> Figure:
        """Captured over one routing, replayed over another."""
        logits = self._random((max(self._bench.sizes.checked_rows), NUM_EXPERTS), seed=4)
        x = self._random((len(logits), self._shape.num_inputs), seed=5)
        out = torch.empty((len(x), self._shape.num_columns), dtype=self._dtype, device=self._bench.device)

        def mix() -> None:
            routing, plan = self._route(logits)
            out.copy_(sum_choices(grouped_int4(x, self._packed, plan), routing.weights))

        captured = self._bench.stopwatch.prepare([mix])
        logits.copy_(self._random(tuple(logits.shape), seed=6))
        captured.start()
        self._bench.stopwatch.wait()
        replayed = out.clone()
        mix()
        is_same = same_bits(out, replayed)
        name = f"captured over one routing, replayed over another, {self._dtype_name}"
        return verdict(TABLE, name, {"the same bits": is_same}, passed=is_same)

    def _route(self, logits: Tensor) -> tuple[Routing, SortedRows]:
        routing = route(logits, NUM_CHOICES, renormalized=True)
        rows = grouped_rows(routing.experts.numel(), NUM_EXPERTS)
        return routing, sorted_by_expert(routing.experts, NUM_EXPERTS, rows)

    def _error(self, out: Tensor, weights: Tensor, rows: Tensor, experts: Tensor) -> float:
        worst = 0.0
        for expert, weight in enumerate(weights):
            own = rows[experts == expert].double()
            if len(own):
                expected, magnitudes = own @ weight.double().T, own.abs() @ weight.double().abs().T
                share = share_of_allowed(out[experts == expert], expected, magnitudes)
                worst = share if not share <= worst else worst
        return worst

    def _random(self, shape: Sequence[int], *, seed: int) -> Tensor:
        return random_rows(self._bench, shape, self._dtype, seed=seed)
