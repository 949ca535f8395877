"""A mixture of experts on a CPU: the reference's numbers, and a row's bits whatever is beside it."""

import pytest
import torch
from torch import Tensor

from kernels import cpu_experts, reference
from kernels.cpu_experts import CpuExperts, grouped_linear, plan_experts, router_logits
from kernels.layout import repack_int4_cpu
from kernels.reference import dequantize
from tests.kernels.packed_weights import random_packed_weight

NUM_EXPERTS = 5
WEIGHTS = [random_packed_weight(40, 96, 32, seed=seed) for seed in range(NUM_EXPERTS)]
PACKED = CpuExperts(tuple(repack_int4_cpu(weight) for weight in WEIGHTS))
DENSE = torch.stack([dequantize(weight) for weight in WEIGHTS])


def random_rows(num_rows: int, num_columns: int) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(0))


def random_choices(num_tokens: int, num_choices: int) -> Tensor:
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    return scores.argsort(dim=-1)[:, :num_choices]


@pytest.mark.parametrize("num_rows", [7, 21], ids=["a row a token", "a row an assignment"])
@pytest.mark.parametrize(
    ("experts", "atol", "rtol"), [(PACKED, 0.05, 0.02), (DENSE, 1e-5, 1e-5)], ids=["packed", "dense"]
)
def test_any_spread_over_experts_is_the_reference(
    experts: CpuExperts | Tensor, atol: float, rtol: float, num_rows: int
) -> None:
    x, choices = random_rows(num_rows, 96), random_choices(7, 3)

    out = grouped_linear(x, experts, plan_experts(choices, NUM_EXPERTS))

    torch.testing.assert_close(out, reference.grouped_linear(x, WEIGHTS, choices.flatten()), atol=atol, rtol=rtol)


def test_a_row_has_the_same_bits_whatever_runs_beside_it() -> None:
    x, choices, router = random_rows(30, 96), random_choices(30, 2), random_rows(NUM_EXPERTS, 96)

    together = grouped_linear(x, PACKED, plan_experts(choices, NUM_EXPERTS)).view(30, 2, -1)
    logits = router_logits(x, router)

    for row in (0, 17, 29):
        alone = grouped_linear(x[row : row + 1], PACKED, plan_experts(choices[row : row + 1], NUM_EXPERTS))
        assert torch.equal(together[row], alone)
        assert torch.equal(logits[row], router_logits(x[row : row + 1], router)[0])


def test_a_broken_row_stays_broken_alone() -> None:
    x, choices = random_rows(6, 96), random_choices(6, 2)
    x[2] = float("nan")

    out = grouped_linear(x, PACKED, plan_experts(choices, NUM_EXPERTS)).view(6, 2, -1)

    assert out[2].isnan().all()
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


def test_router_logits_are_a_linear_layer() -> None:
    x, router = random_rows(6, 96), random_rows(NUM_EXPERTS, 96)

    torch.testing.assert_close(router_logits(x, router), x @ router.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_are_weighted_and_summed(dtype: torch.dtype) -> None:
    choices, router = random_rows(12, 40).to(dtype), torch.rand(4, 3, generator=torch.Generator().manual_seed(2))

    out = cpu_experts.sum_choices(choices, router)

    assert out.dtype == dtype
    torch.testing.assert_close(out, reference.sum_choices(choices, router))


def test_no_tokens_give_no_rows() -> None:
    plan = plan_experts(torch.empty(0, 2, dtype=torch.int64), NUM_EXPERTS)

    assert grouped_linear(torch.empty(0, 96), PACKED, plan).shape == (0, 40)
