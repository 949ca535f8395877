"""A step that the device has no memory for is taken back, and smaller ones go on; nobody else pays for it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from server.engine.out_of_memory import is_out_of_memory
from server.engine.request import FinishReason, GenerationRequest, SamplingParams
from server.engine.scheduler import SchedulerLimits
from server.engine.step_budget import RECOVERY_STEPS, StepBudget
from tests.fakes import expected_output
from tests.server.engine.simulation import Simulation, request, simulation


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("memory", [8, 9, 13, 15])
def test_whatever_the_memory_all_get_what_they_get_alone(memory: int, chunk: int | None) -> None:
    engine = simulation(num_blocks=60, budget=24, chunk=chunk)
    engine.runner.memory_tokens = memory
    for index in range(12):
        engine.loop.submit(request(f"r{index}", num_prompt=1 + 3 * index, max_tokens=9))
    engine.run_to_end()
    assert engine.scheduler.stats().num_out_of_memory > 0
    assert max(engine.runner.num_tokens_per_step) <= memory
    for index in range(12):
        assert engine.output(f"r{index}") == expected_output(request("", 1 + 3 * index, 9))
        assert engine.started.count(f"r{index}") == 1
    assert engine.pool.num_free == engine.num_blocks


def no_memory_of_host() -> object:
    return np.empty(2**50)


def no_memory_of_torch() -> object:
    return torch.empty(2**50)


@pytest.mark.parametrize("allocate", [no_memory_of_host, no_memory_of_torch])
def test_what_the_hosts_allocators_raise_is_known(allocate: Callable[[], object]) -> None:
    with pytest.raises((MemoryError, RuntimeError)) as raised:
        allocate()
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_whoever_has_no_memory_the_engine_goes_on(error: Exception) -> None:
    engine = simulation()
    engine.runner.memory_tokens, engine.runner.memory_error = 4, error
    engine.loop.submit(request("long", num_prompt=9))
    engine.run_to_end()
    assert engine.output("long") == expected_output(request("", 9))
    assert engine.scheduler.stats().num_out_of_memory > 0


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError()])
def test_another_error_is_not_taken_for_it(error: Exception) -> None:
    engine = simulation()
    engine.runner.memory_tokens, engine.runner.memory_error = 4, error
    engine.loop.submit(request("long", num_prompt=9))
    with pytest.raises(type(error)):
        engine.loop.step()


def test_those_that_decode_are_halved_until_they_fit() -> None:
    engine = simulation(num_blocks=60, max_num_seqs=8, budget=40)
    for index in range(8):
        engine.loop.submit(request(f"r{index}", max_tokens=20))
    engine.loop.step()
    # given eight that decode, when the device has memory for three
    engine.runner.memory_tokens = 3
    engine.loop.step()
    engine.loop.step()
    engine.loop.step()
    assert engine.scheduler.stats().num_out_of_memory == 2
    assert engine.runner.num_tokens_per_step[1:] == [2]
    # and what waits for its turn keeps its place
    assert engine.scheduler.stats().num_running == 8
    engine.run_to_end()
    assert all(engine.output(f"r{index}") == expected_output(request("", max_tokens=20)) for index in range(8))


def test_what_a_failed_step_was_to_compute_is_read_by_nobody() -> None:
    # given choices of one prompt that start in one step, each from what the first computes there
    engine = simulation(num_blocks=40, budget=40)
    engine.runner.memory_tokens = 10
    for index in range(3):
        engine.loop.submit(GenerationRequest(f"choice {index}", tuple(range(17)), SamplingParams(max_tokens=3)))
    engine.loop.step()
    engine.loop.check_integrity()
    assert engine.pool.num_free == 40
    engine.run_to_end()
    for index in range(3):
        alone = GenerationRequest("", tuple(range(17)), SamplingParams(max_tokens=3))
        assert engine.output(f"choice {index}") == expected_output(alone)
    assert [engine.events[f"choice {index}"][0].num_cached_tokens for index in range(3)] == [0, 16, 16]


def test_what_is_computed_after_a_failed_step_is_shared_as_ever() -> None:
    # given a prompt of three parts, the second of which fails once
    engine = simulation(num_blocks=40, budget=8)
    engine.loop.submit(request("first", num_prompt=25, max_tokens=2))
    engine.loop.step()
    engine.runner.memory_tokens = 7
    engine.loop.step()
    engine.runner.memory_tokens = None
    engine.run_to_end()
    engine.loop.submit(request("again", num_prompt=25, max_tokens=2))
    engine.run_to_end()
    assert engine.events["again"][0].num_cached_tokens == 24


@pytest.mark.parametrize("num_prompt", [5, 8, 20])
def test_one_whose_chunk_does_not_fit_alone_is_computed_in_smaller_ones(num_prompt: int) -> None:
    # given chunks of two blocks, and a device with memory for less
    engine = Simulation(40, 4, SchedulerLimits(4, 24, prefill_chunk=8))
    engine.runner.memory_tokens = 4
    for name in ("first", "second"):
        engine.loop.submit(request(name, num_prompt))
    engine.run_to_end()
    for name in ("first", "second"):
        assert engine.output(name) == expected_output(request("", num_prompt))
    assert engine.pool.num_free == engine.num_blocks


@pytest.mark.parametrize(
    ("chunk", "memory", "num_tries"),
    # six blocks and then three; one block
    [(24, 11, 2), (4, 3, 1)],
)
def test_a_chunk_is_halved_once_and_never_below_a_block(chunk: int, memory: int, num_tries: int) -> None:
    engine = Simulation(40, 4, SchedulerLimits(1, 24, prefill_chunk=chunk))
    engine.runner.memory_tokens = memory
    engine.loop.submit(request("too much", num_prompt=30))
    engine.run_to_end()
    assert engine.finish_reasons("too much") == [FinishReason.ERROR]
    assert engine.scheduler.stats().num_out_of_memory == num_tries


@pytest.mark.parametrize(("chunk", "memory", "deterministic"), [(None, 0, False), (8, 3, False), (8, 7, True)], ids=str)
def test_one_that_no_step_is_small_enough_for_ends_and_the_others_go_on(
    chunk: int | None, memory: int, deterministic: bool
) -> None:
    engine = Simulation(40, 4, SchedulerLimits(4, 24, prefill_chunk=chunk, deterministic=deterministic))
    engine.runner.memory_tokens = memory
    engine.loop.submit(request("too much", num_prompt=20))
    while engine.loop.has_work:
        engine.loop.step()
    [last] = engine.events["too much"]
    assert last.finish_reason is FinishReason.ERROR
    assert last.error is not None
    assert "not enough free memory" in last.error
    # when there is memory again
    engine.runner.memory_tokens = None
    engine.loop.submit(request("next", num_prompt=20))
    engine.run_to_end()
    assert engine.output("next") == expected_output(request("", 20))
    assert engine.pool.num_free == engine.num_blocks


def test_one_that_was_too_long_alone_leaves_the_others_their_places() -> None:
    budget = StepBudget(num_tokens=100, num_seqs=10, min_tokens=1)
    assert budget.shrink(num_tokens=80, num_seqs=1, num_drafted=0)
    assert (budget.num_tokens, budget.num_seqs) == (40, 10)


def test_a_smaller_step_has_room_for_a_chunk_behind_all_that_decode() -> None:
    budget = StepBudget(num_tokens=100, num_seqs=10, min_tokens=16)
    assert budget.shrink(num_tokens=36, num_seqs=8, num_drafted=0)
    # two decode, and the third has its sixteen
    assert (budget.num_tokens, budget.num_seqs) == (18, 3)


def test_a_budget_halves_and_grows_back_to_what_it_was() -> None:
    budget = StepBudget(num_tokens=100, num_seqs=10, min_tokens=8)
    assert budget.shrink(num_tokens=60, num_seqs=5, num_drafted=0)
    assert (budget.num_tokens, budget.num_seqs) == (30, 2)
    assert budget.shrink(num_tokens=12, num_seqs=2, num_drafted=0)
    assert (budget.num_tokens, budget.num_seqs) == (8, 1)
    assert not budget.shrink(num_tokens=8, num_seqs=1, num_drafted=0)
    sizes = []
    for _ in range(5 * RECOVERY_STEPS):
        budget.note_success()
        sizes.append((budget.num_tokens, budget.num_seqs))
    assert sizes[RECOVERY_STEPS - 2 :: RECOVERY_STEPS] == [(8, 1), (16, 2), (32, 4), (64, 8), (100, 10)]
