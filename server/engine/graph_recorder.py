"""What the device is asked to do, recorded once and asked again without the host's part in it: CUDA graphs."""

from collections.abc import Callable
from typing import Protocol

import torch

Replay = Callable[[], None]


class GraphRecorder(Protocol):
    """A recording reads and writes the very memory that it did when it was made, with the same numbers of the host's.

    Recordings share what they compute in: what one leaves behind outside of tensors that were there before is lost
    when another is replayed. No two are replayed at once.
    """

    def record(self, run: Callable[[], None]) -> Replay:
        """Record what `run` asks of the device, which has run before, so that nothing is left to compile or set up.

        It must not wait for the device. Raises what it raises, and what the device has no memory for.
        """
        ...


class CudaGraphRecorder:
    """CUDA graphs with one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []

    def record(self, run: Callable[[], None]) -> Replay:
        torch.cuda.synchronize()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                run()
        except RuntimeError:
            # a recording that could not even be ended leaves its stream current and its pool in use, and the allocator
            # still knows the graph
            torch.cuda.set_stream(stream)
            self._pool = torch.cuda.graph_pool_handle()
            self._failed.append(graph)
            raise
        return graph.replay
