"""A block twice: as the source has it, and as far as it is quantized. What cannot change any more is not run again.

Much of a quantization's time are runs of blocks. The original never changes, and in the other nothing does that lies
before what is left to round: what modules read and gave there is kept, as far as memory goes.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from quant.capture import BlockInput, Observation, observe, run_block
from quant.residual import BLOCK

# kept of each of the two blocks, at most; chunks beyond it are run again
KEPT_BYTES = 2**29


class OriginalBlock:
    """The block as the source has it, of that index in the model, and the chunks that go into it."""

    def __init__(self, block: nn.Module, index: int, chunks: Sequence[BlockInput]) -> None:
        self._block = block
        self._index = index
        self._chunks = chunks
        self._kept: list[Observation] = []

    def run(self, inputs: Collection[str], outputs: Collection[str]) -> list[BlockInput]:
        """The next block's inputs; keeps what the named modules read and gave of the first chunks."""
        results, num_bytes = [], 0
        for chunk in self._chunks:
            seen = observe(self._block, self._index, chunk, inputs, {BLOCK, *outputs})
            results.append(BlockInput(seen.outputs[BLOCK].view_as(chunk.hidden), chunk.contexts))
            num_bytes += sum(states.nbytes for states in (*seen.inputs.values(), *seen.outputs.values()))
            if num_bytes <= KEPT_BYTES:
                self._kept.append(seen)
        return results

    def observe(self, number: int, inputs: Collection[str], outputs: Collection[str]) -> Observation:
        """What the named modules read and gave in that chunk; `run` was told of all of them."""
        if number < len(self._kept):
            return self._kept[number]
        return observe(self._block, self._index, self._chunks[number], inputs, outputs)


class CurrentBlock:
    """The block that is quantized in place, of that index in the model, and the chunks that go into it."""

    def __init__(self, block: nn.Module, index: int, chunks: Sequence[BlockInput]) -> None:
        self.block = block
        self.index = index
        self.chunks = chunks
        self._settled: dict[str, dict[int, object]] = {}
        self._num_bytes = 0

    def settle(self, names: Collection[str]) -> None:
        """From now on the named modules give what they give at their next run: nothing before them changes either."""
        self._settled |= {name: {} for name in names if name not in self._settled}

    def observe(self, number: int, inputs: Collection[str], outputs: Collection[str] = ()) -> Observation:
        """What the named modules read and gave in the chunk of that number."""
        with self._replaying(number):
            return observe(self.block, self.index, self.chunks[number], inputs, outputs)

    def run(self, number: int) -> BlockInput:
        """The chunk of that number as the block leaves it."""
        with self._replaying(number):
            return run_block(self.block, self.index, self.chunks[number])

    @contextmanager
    def _replaying(self, number: int) -> Iterator[None]:
        """What is settled gives what it gave in that chunk before, or is noted."""
        hooks, replayed = [], []
        for name, kept in self._settled.items():
            module = self.block.get_submodule(name)
            if number in kept:
                # in the module itself rather than in its place: blocks read settings of their attention
                vars(module)["forward"] = _Replay(kept[number])
                replayed.append(module)
            else:
                hooks.append(module.register_forward_hook(self._noting(kept, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in replayed:
                del vars(module)["forward"]

    def _noting(self, kept: dict[int, object], number: int) -> Callable[[nn.Module, object, object], None]:
        def note(_module: nn.Module, _arguments: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            num_bytes = sum(part.nbytes for part in tensors if isinstance(part, Tensor))
            if self._num_bytes + num_bytes <= KEPT_BYTES:
                self._num_bytes += num_bytes
                kept[number] = _copied(output)

        return note


@dataclass(frozen=True)
class BlockPair:
    """Both, with the same chunks on their two ways."""

    original: OriginalBlock
    current: CurrentBlock


class _Replay:
    """Stands in for a module's forward: gives what it gave, a copy because some blocks add up in place."""

    def __init__(self, output: object) -> None:
        self._output = output

    def __call__(self, *_positional: object, **_named: object) -> object:
        return _copied(self._output)


def _copied(output: object) -> object:
    """What a module gave, a tensor or a tuple with tensors in it, at another place in memory."""
    if isinstance(output, tuple):
        return tuple(_copied(part) for part in output)
    return output.clone() if isinstance(output, Tensor) else output
