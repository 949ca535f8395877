"""Runs many small pieces of tensor work at once, each on a thread of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The work's result for every item, in order; as many at a time as torch has threads.

    For operations too small to be worth sharing among threads, of which there are many. Each runs on one thread, so
    its bits do not depend on how many there are. An error of any of them is raised.
    """

    def on_one_thread(item: Item) -> Result:
        with torch.no_grad():
            return work(item)

    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(on_one_thread, items))
    finally:
        # what the threads were told is also what torch would give every thread that is new
        torch.set_num_threads(num_threads)
