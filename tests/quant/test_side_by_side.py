"""Small pieces of work on several threads: results in order, bits that do not depend on the threads, errors raised."""

import threading

import pytest
import torch
from torch import Tensor

from quant.device import HOST
from quant.side_by_side import run_side_by_side


def test_results_come_in_the_order_of_the_items() -> None:
    assert run_side_by_side(lambda number: number**2, range(100), HOST) == [number**2 for number in range(100)]


def test_each_piece_runs_on_one_thread_and_the_caller_keeps_its_own() -> None:
    before = torch.get_num_threads()
    assert set(run_side_by_side(lambda _: torch.get_num_threads(), range(8), HOST)) == {1}
    assert torch.get_num_threads() == before
    # and so does a thread that starts later
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [before]


def test_a_gpu_takes_one_piece_after_the_other() -> None:
    own = threading.get_ident()
    assert run_side_by_side(lambda number: (number, threading.get_ident()), range(3), torch.device("cuda")) == [
        (number, own) for number in range(3)
    ]


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(3, requires_grad=True)

    def double(number: int) -> Tensor:
        return weight * number

    with torch.no_grad():
        assert not any(result.requires_grad for result in run_side_by_side(double, range(3), HOST))


def test_an_error_reaches_the_caller() -> None:
    def fail(number: int) -> int:
        if number == 3:
            raise ValueError("number 3")
        return number

    with pytest.raises(ValueError, match="number 3"):
        run_side_by_side(fail, range(5), HOST)
