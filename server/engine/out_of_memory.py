"""Which errors say that a step had no memory. torch has a type for its own allocator on GPUs only."""

import torch

from server.engine.step_plan import StepPlan, StepResult, StepRunner

# in lower case, of RuntimeErrors: CUDA's driver, also as Triton reports it; torch's CPU allocator, by system; C++'s
# own, through a torch operation; cuBLAS, for its workspace
_WORDS = (
    "out of memory",
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "std::bad_alloc",
    "cublas_status_alloc_failed",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the host had no memory for what was asked: less may fit."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in _WORDS)


def execute_within_memory(runner: StepRunner, plan: StepPlan) -> StepResult | None:
    """What came out of a step; None where it ran out of memory. Other errors pass.

    Nothing of the step is alive when this returns: the error, which keeps what was computed, has ended.
    """
    try:
        return runner.execute(plan)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    return None
