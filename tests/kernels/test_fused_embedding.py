"""The gather of embedding rows against the reference: halves and int8 rows, ids outside of the table."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_fused
from kernels.fused_embedding import gather_int8_rows, gather_rows
from tests.kernels.launches import DEVICE, HALF_TYPES, fresh_memory_is_nan


def gather(token_ids: Tensor, table: Tensor) -> Tensor:
    with fresh_memory_is_nan():
        return gather_rows(token_ids.to(DEVICE), table.to(DEVICE)).cpu()


def gather_int8(token_ids: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    with fresh_memory_is_nan():
        return gather_int8_rows(token_ids.to(DEVICE), codes.to(DEVICE), scales.to(DEVICE)).cpu()


@settings(max_examples=10, deadline=None)
@given(
    token_ids=st.lists(st.integers(-2, 40), min_size=1, max_size=6),
    width=st.one_of(st.sampled_from([576, 1536]), st.integers(1, 70)),
    dtype=st.sampled_from(HALF_TYPES),
)
def test_any_ids_give_their_rows(token_ids: list[int], width: int, dtype: torch.dtype) -> None:
    # given a table of 39 rows: -2, -1, 39 and 40 are outside of it
    generator = torch.Generator().manual_seed(width)
    table = torch.randn(39, width, generator=generator).to(dtype)
    codes = torch.randint(-128, 128, (39, width), generator=generator, dtype=torch.int8)
    scales = torch.rand(39, generator=generator).to(dtype)
    ids = torch.tensor(token_ids)

    torch.testing.assert_close(
        gather(ids, table), reference_fused.gather_rows(ids, table), rtol=0, atol=0, equal_nan=True
    )
    torch.testing.assert_close(
        gather_int8(ids, codes, scales),
        reference_fused.gather_int8_rows(ids, codes, scales),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


def test_a_worked_example() -> None:
    codes = torch.tensor([[1, -128], [127, 0]], dtype=torch.int8)
    scales = torch.tensor([2.0, 0.5], dtype=torch.float16)

    assert gather_int8(torch.tensor([1, 0, 1]), codes, scales).tolist() == [[63.5, 0.0], [2.0, -256.0], [63.5, 0.0]]


def test_no_tokens_are_no_launch() -> None:
    assert gather(torch.empty(0, dtype=torch.int64), torch.ones(3, 5).half()).shape == (0, 5)


def test_operands_that_do_not_fit_are_refused() -> None:
    table, ids = torch.ones(3, 5, dtype=torch.float16), torch.tensor([1])

    with pytest.raises(ValueError, match="float16 or bfloat16"):
        gather_rows(ids, table.float())
    with pytest.raises(ValueError, match="token_ids must be contiguous int64"):
        gather_rows(ids.int(), table)
    with pytest.raises(ValueError, match=r"the table must be \[V, K\]"):
        gather_rows(ids, table[0])
    with pytest.raises(ValueError, match="codes must be int8"):
        gather_int8_rows(ids, table, table[:, 0])
    with pytest.raises(ValueError, match=r"scales must be contiguous \[3\]"):
        gather_int8_rows(ids, table.to(torch.int8), table[:, 0])
