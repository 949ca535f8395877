"""Low-rank adapters: every row meets its own, rows without one stay as they are, and no row depends on another."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu_lora, fused_lora, reference
from kernels.lora import LORA_ROWS, AdapterRows, LoraStack, plan_rows
from kernels.tiles import LORA_COLUMNS
from tests.kernels.launches import DEVICE, HALF_TYPES, LAST_PLACE, fresh_memory_is_nan

AddLora = Callable[[Tensor, Tensor, LoraStack, AdapterRows], None]
NUM_ADAPTERS = 3
CPU = torch.device("cpu")
# of a layer by itself, of gate and up, of queries, keys and values; none a multiple of a tile, one wider than it
PART_WIDTHS = ((40,), (24, 24), (LORA_COLUMNS + 8, 12, 20))


def random_numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_stack(part_widths: tuple[int, ...], num_inputs: int, rank: int, dtype: torch.dtype) -> LoraStack:
    down = random_numbers(NUM_ADAPTERS, len(part_widths) * rank, num_inputs, dtype=torch.float32, seed=1)
    up = random_numbers(NUM_ADAPTERS, sum(part_widths), rank, dtype=torch.float32, seed=2)
    return LoraStack((down * num_inputs**-0.5).to(dtype), (up * rank**-0.5).to(dtype), part_widths)


def spans_of(adapters: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(adapter, row, row + 1) for row, adapter in enumerate(adapters) if adapter >= 0]


def run_cpu(out: Tensor, x: Tensor, stack: LoraStack, adapters: Sequence[int]) -> Tensor:
    out = out.clone()
    cpu_lora.add_lora(out, x, stack, plan_rows(spans_of(adapters), CPU))
    return out


def run_triton(out: Tensor, x: Tensor, stack: LoraStack, adapters: Sequence[int]) -> Tensor:
    there = LoraStack(stack.down.to(DEVICE), stack.up.to(DEVICE), stack.part_widths)
    out = out.to(DEVICE, copy=True)
    with fresh_memory_is_nan():
        fused_lora.add_lora(out, x.to(DEVICE), there, plan_rows(spans_of(adapters), DEVICE))
    return out.cpu()


RUNS = pytest.mark.parametrize(("run", "dtype"), [(run_cpu, torch.float32), (run_triton, torch.bfloat16)])


@settings(max_examples=6, deadline=None)
@given(
    adapters=st.lists(st.integers(-1, NUM_ADAPTERS - 1), min_size=1, max_size=40),
    part_widths=st.sampled_from(PART_WIDTHS),
    num_inputs=st.sampled_from([32, 64, 200, 576]),
    rank=st.sampled_from([16, 32]),
    dtype=st.sampled_from(HALF_TYPES),
)
def test_any_spread_over_adapters_is_the_reference_in_triton(
    adapters: list[int], part_widths: tuple[int, ...], num_inputs: int, rank: int, dtype: torch.dtype
) -> None:
    stack = random_stack(part_widths, num_inputs, rank, dtype)
    x = random_numbers(len(adapters), num_inputs, dtype=dtype, seed=3)
    out = random_numbers(len(adapters), sum(part_widths), dtype=dtype, seed=4)

    added = run_triton(out, x, stack, adapters)

    expected = reference.add_lora(out, x, stack, torch.tensor(adapters))
    # what is between the products may be rounded to either side
    torch.testing.assert_close(added, expected, rtol=LAST_PLACE[dtype], atol=4 * LAST_PLACE[dtype])


@pytest.mark.parametrize("part_widths", PART_WIDTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4 * 2.0**-7)])
def test_any_spread_over_adapters_is_the_reference_on_a_cpu(
    part_widths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    adapters = [row * row % 4 - 1 for row in range(LORA_ROWS + 5)] + [2] * (LORA_ROWS + 1)
    stack = random_stack(part_widths, 100, 16, dtype)
    x = random_numbers(len(adapters), 100, dtype=dtype, seed=3)
    out = random_numbers(len(adapters), sum(part_widths), dtype=dtype, seed=4)

    added = run_cpu(out, x, stack, adapters)

    torch.testing.assert_close(
        added, reference.add_lora(out, x, stack, torch.tensor(adapters)), rtol=tolerance, atol=tolerance
    )


@RUNS
def test_a_row_has_the_same_bits_whatever_runs_beside_it(
    run: Callable[[Tensor, Tensor, LoraStack, Sequence[int]], Tensor], dtype: torch.dtype
) -> None:
    stack = random_stack(PART_WIDTHS[1], 160, 16, dtype)
    adapters = [row % 2 for row in range(2 * LORA_ROWS + 5)]
    x = random_numbers(len(adapters), 160, dtype=dtype, seed=3)
    out = random_numbers(len(adapters), sum(PART_WIDTHS[1]), dtype=dtype, seed=4)

    together = run(out, x, stack, adapters)

    for row in (0, 3, LORA_ROWS, len(adapters) - 1):
        alone = slice(row, row + 1)
        assert torch.equal(run(out[alone], x[alone], stack, adapters[alone]), together[alone])


@RUNS
def test_rows_without_an_adapter_keep_their_bits_and_a_broken_row_stays_broken_alone(
    run: Callable[[Tensor, Tensor, LoraStack, Sequence[int]], Tensor], dtype: torch.dtype
) -> None:
    stack = random_stack(PART_WIDTHS[0], 64, 16, dtype)
    adapters = [-1, 0, 1, -1, 0]
    x = random_numbers(5, 64, dtype=dtype, seed=3)
    out = random_numbers(5, 40, dtype=dtype, seed=4)
    whole = run(out, x, stack, adapters)
    x[0] = x[1] = float("nan")

    added = run(out, x, stack, adapters)

    assert torch.equal(added[[0, 3]], out[[0, 3]])
    assert added[1].isnan().all()
    assert torch.equal(added[[2, 4]], whole[[2, 4]])


def test_no_rows_change_nothing() -> None:
    stack = random_stack(PART_WIDTHS[0], 64, 16, torch.float16)
    out, x = torch.ones(2, 40).half(), torch.ones(2, 64).half()
    for run in (run_cpu, run_triton):
        assert torch.equal(run(out, x, stack, [-1, -1]), out)


def test_rows_are_tiled_adapter_by_adapter() -> None:
    rows = plan_rows([(2, 0, 3), (0, 5, 5 + LORA_ROWS + 1), (2, 4, 5)], CPU)

    assert rows.order.tolist() == [*range(5, 5 + LORA_ROWS + 1), 0, 1, 2, 4]
    assert rows.tile_adapters.tolist() == [0, 0, 2]
    end = LORA_ROWS + 1
    assert rows.tile_rows.tolist() == [[0, LORA_ROWS], [LORA_ROWS, end], [end, end + 4]]


def test_operands_that_do_not_fit_are_refused() -> None:
    stack = random_stack((24, 24), 64, 16, torch.float16)
    x, out = torch.ones(3, 64).half(), torch.ones(3, 48).half()
    wrong = {
        r"x must be \[T, 64\]": (out, x[:, :32], stack),
        r"out must be \[3, 48\]": (out[:, :24], x, stack),
        "1 to 3 parts must have 48 outputs together": (out, x, LoraStack(stack.down, stack.up, (24, 20))),
        "they are of other adapters": (out, x, LoraStack(stack.down[:, :16], stack.up, (24, 24))),
        "adapters of torch.float16 take activations of that, not torch.bfloat16": (out, x.bfloat16(), stack),
    }
    for run in (run_cpu, run_triton):
        for words, (some_out, some_x, some_stack) in wrong.items():
            with pytest.raises(ValueError, match=words):
                run(some_out, some_x, some_stack, [0, 1, -1])
    with pytest.raises(ValueError, match="x must be float16 or bfloat16"):
        run_triton(out.float(), x.float(), random_stack((24, 24), 64, 16, torch.float32), [0, 1, -1])
