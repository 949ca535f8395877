"""A mixture of experts on a CPU: each expert that was chosen multiplies its own rows, in turn.

Legend: T = tokens, C = choices of a token (top-k), A = T * C assignments, E = experts, N = out, K = in features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import cpu
from kernels.layout import PackedWeight


@dataclass(frozen=True)
class CpuExperts:
    """INT4_CPU weights [N, K] of equal shape, one an expert."""

    weights: tuple[PackedWeight, ...]


@dataclass(frozen=True)
class CpuExpertPlan:
    """places: per expert that has any, its number and its assignments, int64, in their own order."""

    places: tuple[tuple[int, Tensor], ...]
    num_assignments: int


def plan_experts(experts: Tensor, num_experts: int) -> CpuExpertPlan:
    """Who multiplies what, for the choices experts int64 [T, C] of E."""
    by_expert = experts.flatten().argsort(stable=True)
    counts = torch.bincount(experts.flatten(), minlength=num_experts).tolist()
    parts = enumerate(torch.split(by_expert, counts))
    return CpuExpertPlan(tuple((expert, part) for expert, part in parts if len(part)), experts.numel())


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K] times weight [E, K] transposed: [T, E] in x's dtype. A row at a time: who is beside it must not matter.

    A product of many rows sums in an order that depends on their number, and the least difference may change a choice.
    """
    logits = torch.empty((len(x), len(weight)), dtype=x.dtype)
    for row, out in zip(x, logits, strict=True):
        torch.mv(weight, row, out=out)
    return logits


def grouped_linear(x: Tensor, experts: CpuExperts | Tensor, plan: CpuExpertPlan) -> Tensor:
    """Each assignment's row of x times its expert's weight, transposed: [A, N] in x's dtype, in assignments' order.

    x: [T, K], where the C assignments of a token share its row, or [A, K]. experts: packed, or dense [E, N, K] in x's
    dtype. A packed expert's rows are those of `cpu.quantized_linear`, with what that promises of a row's bits.
    """
    repeats = plan.num_assignments // max(len(x), 1)
    num_columns = experts.weights[0].shape[0] if isinstance(experts, CpuExperts) else experts.shape[1]
    out = torch.empty((plan.num_assignments, num_columns), dtype=x.dtype)
    for expert, places in plan.places:
        rows = x[places // repeats]
        if isinstance(experts, CpuExperts):
            out[places] = cpu.quantized_linear(rows, experts.weights[expert])
        else:
            out[places] = torch.nn.functional.linear(rows, experts[expert])
    return out


def sum_choices(choices: Tensor, router: Tensor) -> Tensor:
    """choices [T * C, N] times router weights float32 [T, C], added in float32 in a token's order: [T, N]."""
    of_token = choices.view(*router.shape, -1).float()
    total = of_token[:, 0] * router[:, :1]
    for choice in range(1, router.shape[1]):
        total.addcmul_(of_token[:, choice], router[:, choice : choice + 1])
    return total.to(choices.dtype)
