"""A block twice: as the source has it, and as far as it is quantized. What cannot change any more is not run again.

Much of a quantization's time are runs of blocks. The original never changes, and in the other nothing does that lies
before what is left to round: what modules read there is kept, as far as memory goes. What linears read is kept no finer
than their products read it, so all runs are to be those of `fast_products`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from quant.capture import BlockInput, ClosedChild, Observation, observe, run_block
from quant.fast_products import product_dtype
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
            inputs_kept = {name: self._shortened(name, states) for name, states in seen.inputs.items()}
            kept = Observation(inputs_kept, seen.outputs)
            # the block's output is there anyway, as the next one's input
            others = [states for name, states in seen.outputs.items() if name != BLOCK]
            num_bytes += sum(states.nbytes for states in (*kept.inputs.values(), *others))
            if num_bytes <= KEPT_BYTES:
                self._kept.append(kept)
        return results

    def observe(self, number: int, inputs: Collection[str], outputs: Collection[str]) -> Observation:
        """What the named modules read and gave in that chunk; `run` was told of all of them."""
        if number < len(self._kept):
            kept = self._kept[number]
            return Observation({name: kept.inputs[name].float() for name in inputs}, kept.outputs)
        return observe(self._block, self._index, self._chunks[number], inputs, outputs)

    def _shortened(self, name: str, states: Tensor) -> Tensor:
        return states.to(product_dtype()) if isinstance(self._block.get_submodule(name), nn.Linear) else states


class CurrentBlock:
    """The block that is quantized in place, of that index in the model, and the chunks that go into it."""

    def __init__(self, block: nn.Module, index: int, chunks: Sequence[BlockInput]) -> None:
        self.block = block
        self.index = index
        self.chunks = chunks
        self._settled: dict[ClosedChild, dict[int, Tensor]] = {}
        self._num_bytes = 0

    def settle(self, children: Collection[ClosedChild]) -> None:
        """From now on nothing changes what the linears that close these children read; it is noted at the next run."""
        self._settled |= {child: {} for child in children if child not in self._settled}

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
        """Of what is settled only the linears at its end are run, or what they read is noted."""
        hooks, replayed = [], []
        for child, kept in self._settled.items():
            closing = self.block.get_submodule(child.closing)
            if number in kept:
                module = self.block.get_submodule(child.name)
                # in the module itself rather than in its place: blocks read settings of their attention
                vars(module)["forward"] = _Replay(closing, kept[number], child)
                replayed.append(module)
            else:
                hooks.append(closing.register_forward_pre_hook(self._noting(kept, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in replayed:
                del vars(module)["forward"]

    def _noting(self, kept: dict[int, Tensor], number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            states = arguments[0].to(product_dtype())
            if self._num_bytes + states.nbytes <= KEPT_BYTES:
                self._num_bytes += states.nbytes
                kept[number] = states

        return note


class _Replay:
    """Stands in for a child's forward: runs the linear that closes it on what that reads."""

    def __init__(self, closing: nn.Module, states: Tensor, child: ClosedChild) -> None:
        self._closing = closing
        self._states = states
        self._child = child

    def __call__(self, *_positional: object, **_named: object) -> object:
        # hooks see the linear as ever; where the child is the linear itself, this is already inside of its call
        is_linear = self._child.name == self._child.closing
        states = self._states.to(self._closing.get_parameter("weight").dtype)
        output = type(self._closing).forward(self._closing, states) if is_linear else self._closing(states)
        return output if self._child.num_others is None else (output, *[None] * self._child.num_others)


@dataclass(frozen=True)
class BlockPair:
    """Both, with the same chunks on their two ways."""

    original: OriginalBlock
    current: CurrentBlock
