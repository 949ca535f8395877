"""Runs many small pieces of tensor work: on the CPU at once, each on a thread of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from quant.device import CUDA

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_side_by_side(work: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """The work's result for every item, in order; on the CPU as many at a time as torch has threads.

    For operations too small to be worth sharing among threads, of which there are many. Each runs on one thread, so
    its bits do not depend on how many there are. A GPU, which the work of all of them would share, takes one after the
    other. device: where the work's tensors are. An error of any of them is raised.
    """

    def without_gradients(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    if device.type == CUDA:
        return [without_gradients(item) for item in items]
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(without_gradients, items))
    finally:
        # what the threads were told is also what torch would give every thread that is new
        torch.set_num_threads(num_threads)
