"""Log-probabilities on the device against the plain definition: chosen tokens, the likeliest, ties, poisoned rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_sampling
from kernels.fused_logprobs import collect_logprobs
from tests.kernels.launches import DEVICE, fresh_memory_is_nan

TOLERANCE = 3e-6


def collect(logits: Tensor, chosen: list[int], num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor(chosen, dtype=torch.int64)
    with fresh_memory_is_nan():
        chosen_logprobs, top_ids, top_logprobs = collect_logprobs(logits.to(DEVICE), ids.to(DEVICE), num_top)
    return chosen_logprobs.cpu(), top_ids.cpu(), top_logprobs.cpu()


@settings(max_examples=10, deadline=None)
@given(
    num_rows=st.integers(1, 3),
    vocab_size=st.sampled_from([1, 20, 1009, 9000]),
    num_top=st.integers(0, 6),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    digits=st.sampled_from([0, 6]),
)
def test_any_rows_are_the_definition(num_rows: int, vocab_size: int, num_top: int, spread: float, digits: int) -> None:
    # with no digits many logits tie, and the smaller ids come first
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * spread).round(decimals=digits)
    chosen = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    num_top = min(num_top, vocab_size)

    chosen_logprobs, top_ids, top_logprobs = collect(logits, chosen.tolist(), num_top)

    expected = reference_sampling.collect_logprobs(logits, chosen, num_top)
    torch.testing.assert_close(chosen_logprobs, expected[0], rtol=1e-6, atol=TOLERANCE)
    assert torch.equal(top_ids, expected[1])
    torch.testing.assert_close(top_logprobs, expected[2], rtol=1e-6, atol=TOLERANCE)


def test_a_worked_example() -> None:
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()[None]

    chosen, ids, values = collect(logits, [1], 3)

    torch.testing.assert_close(chosen.exp(), torch.tensor([0.1]))
    assert ids.tolist() == [[0, 2, 3]]
    torch.testing.assert_close(values.exp(), torch.tensor([[0.5, 0.25, 0.15]]))


def test_the_chosen_token_has_the_same_number_in_the_list() -> None:
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    best = int(logits.argmax())

    chosen, ids, values = collect(logits, [best], 1)

    assert ids.tolist() == [[best]]
    assert chosen[0] == values[0, 0]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(poison: float) -> None:
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    clean = collect(logits, [1, 2, 3], 4)
    logits[1, 50] = poison

    poisoned = collect(logits, [1, 2, 3], 4)

    assert poisoned[0][1].isnan()
    assert all(torch.equal(one[[0, 2]], other[[0, 2]]) for one, other in zip(poisoned, clean, strict=True))


def test_no_token_has_no_number() -> None:
    chosen, _, _ = collect(torch.zeros(2, 8), [-1, 3], 0)

    assert chosen[0].isnan()
    torch.testing.assert_close(chosen[1:].exp(), torch.tensor([0.125]))


def test_barred_tokens_come_last() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]])

    _, ids, values = collect(logits, [1], 3)

    assert ids[0, :2].tolist() == [1, 3]
    assert values[0, 2] == float("-inf")


def test_operands_that_do_not_fit_are_refused() -> None:
    logits, chosen = torch.zeros(2, 8), torch.tensor([0, 1])

    with pytest.raises(ValueError, match=r"logits must be float32 \[S, V\]"):
        collect_logprobs(logits.half(), chosen, 1)
    with pytest.raises(ValueError, match=r"chosen must be contiguous int64 \[2\]"):
        collect_logprobs(logits, chosen[:1], 1)
    with pytest.raises(ValueError, match="num_top must be from 0 to the 8 tokens"):
        collect_logprobs(logits, chosen, 9)
