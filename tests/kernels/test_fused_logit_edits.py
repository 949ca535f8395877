"""Bias, penalties, mask and temperature on the device: the same numbers as the definition, to the bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference_sampling
from kernels.fused_logit_edits import edit_logits
from tests.kernels.launches import DEVICE, fresh_memory_is_nan
from tests.kernels.sampling_rows import Row, build_batch, on_device

VOCAB_SIZE = 1111

any_row = st.builds(
    Row,
    repetition=st.sampled_from([1.0, 1.3, 0.5]),
    presence=st.sampled_from([0.0, 0.7]),
    frequency=st.sampled_from([0.0, -0.3]),
    prompt=st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=5),
    output=st.lists(st.integers(0, 9), max_size=9),
    bias=st.dictionaries(st.integers(0, VOCAB_SIZE - 1), st.sampled_from([5.0, -100.0, float("-inf")]), max_size=3),
    allowed=st.sampled_from([None, range(0, VOCAB_SIZE, 3), range(31, 1060)]),
)


def edited(logits: Tensor, rows: list[Row]) -> Tensor:
    batch = on_device(build_batch(rows, logits.shape[1]))
    with fresh_memory_is_nan():
        return edit_logits(logits.to(DEVICE), batch).cpu()


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(any_row, min_size=1, max_size=3))
def test_any_edits_are_the_definition(rows: list[Row]) -> None:
    logits = torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(len(rows)))

    assert torch.equal(edited(logits, rows), reference_sampling.edit_logits(logits, build_batch(rows, VOCAB_SIZE)))


def test_a_worked_example() -> None:
    # given logits of ids 0..4, prompt (1, 2), output (2, 3, 3)
    logits = torch.tensor([[1.0, 2.0, -2.0, 4.0, 3.0]])
    row = Row(repetition=2.0, presence=0.5, frequency=0.25, prompt=[1, 2], output=[2, 3, 3], temperature=0.5)

    # then 1: prompt only, 2/2 = 1. 2: -2*2 = -4, once in the output: -4 - 0.5 - 0.25. 3: 4/2 = 2 - 0.5 - 2*0.25
    assert edited(logits, [row]).tolist() == [[2.0, 2.0, -9.5, 2.0, 6.0]]


def test_bias_comes_before_the_penalty_and_the_mask_last() -> None:
    row = Row(repetition=2.0, prompt=[0], bias={0: 3.0, 2: 50.0}, allowed=[0, 1])

    assert edited(torch.tensor([[1.0, 4.0, 0.0]]), [row]).tolist() == [[2.0, 4.0, float("-inf")]]


def test_a_greedy_row_is_not_divided() -> None:
    logits = torch.tensor([[3.0, -1.0], [3.0, -1.0]])

    assert edited(logits, [Row(temperature=0.0), Row(temperature=2.0)]).tolist() == [[3.0, -1.0], [1.5, -0.5]]


def test_rows_of_logits_may_lie_apart() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))

    assert torch.equal(edited(logits[:, 10:40], [Row(), Row()]), logits[:, 10:40])
