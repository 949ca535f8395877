"""Compiles what a piece of work would launch, all of it at once and before anything is launched."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

from triton import knobs
from triton.runtime.jit import JITFunction, JitFunctionInfo


@dataclass(frozen=True)
class NeededKernel:
    """A kernel as it would be compiled for a launch. name: of its function. data: Triton's own description, as JSON."""

    name: str
    function: JITFunction
    data: str


def find_needed_kernels(work: Callable[[], object]) -> tuple[NeededKernel, ...]:
    """What `work` would compile, each once. None of its launches is made, so what it computes means nothing.

    For one thread at a time, and no other may launch kernels meanwhile.
    """
    needed: dict[tuple[JITFunction, str], NeededKernel] = {}

    def note(*, key: str, fn: JitFunctionInfo, compile: dict[str, object], **_: object) -> bool:
        needed[fn.jit_function, key] = NeededKernel(fn.name, fn.jit_function, str(compile["specialization_data"]))
        # nor is it compiled
        return True

    with _without_launches(note):
        work()
    return tuple(needed.values())


def compile_kernels(kernels: tuple[NeededKernel, ...], num_threads: int, report: Callable[[int, int], None]) -> None:
    """Compile all, as many at a time, or take them from Triton's cache. report: told how many are done, of how many.

    Triton's own exception tells why one cannot be.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        # most of a compilation is done by LLVM and ptxas, without Python's lock
        futures = [pool.submit(kernel.function.preload, kernel.data) for kernel in kernels]
        for num_done, future in enumerate(as_completed(futures), 1):
            future.result()
            report(num_done, len(futures))


@contextmanager
def _without_launches(note: object) -> Iterator[None]:
    """Triton asks `note` before it compiles, and launches nothing, not even what it has compiled already."""
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:  # noqa: ARG001
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run, knobs.runtime.jit_cache_hook = compile_only, note
    try:
        yield
    finally:
        JITFunction.run, knobs.runtime.jit_cache_hook = run, None
