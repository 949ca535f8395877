"""A block twice: as the source has it, and as far as it is quantized. What cannot change any more is not run again.

Much of a quantization's time are runs of blocks. The original never changes, so it is run once and its weights need
not stay; and in the other nothing does that lies before what is left to round: what modules read there is kept. What
linears read is kept no finer than their products read it, so all runs are to be those of `fast_products`. It is kept
on the host, and told where the block is.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.capture import BlockInput, Chunks, ClosedChild, Observation, observe, run_block
from quant.device import device_of
from quant.fast_products import product_dtype
from quant.kept_states import KeptChunks
from quant.kept_tensors import KeptTensors, Scratch
from quant.residual import BLOCK


class OriginalBlock:
    """What a block did as the source has it, with the chunks that go into it: all that is ever asked of it is kept."""

    def __init__(self, device: torch.device, scratch: Scratch) -> None:
        """device: where the block is."""
        self.outputs = KeptChunks(scratch)
        self._device = device
        self._tensors = KeptTensors(scratch)
        self._places: list[dict[tuple[str, str], int]] = []

    @classmethod
    def run(
        cls,
        block: nn.Module,
        index: int,
        chunks: Iterable[BlockInput],
        inputs: Collection[str],
        outputs: Collection[str],
        scratch: Scratch,
    ) -> "OriginalBlock":
        """Run the block of that index in the model, and note what the named modules read and gave in each chunk."""
        original = cls(device_of(block), scratch)
        for chunk in chunks:
            seen = observe(block, index, chunk, inputs, {BLOCK, *outputs})
            original.outputs.append(BlockInput(seen.outputs[BLOCK].view_as(chunk.hidden), chunk.contexts))
            read = {("read", name): _shortened(block, name, states) for name, states in seen.inputs.items()}
            # the block's output is there anyway, as the next one's input
            given = {("gave", name): states for name, states in seen.outputs.items() if name != BLOCK}
            original._note({**read, **given})
        return original

    def observe(self, number: int, inputs: Collection[str], outputs: Collection[str]) -> Observation:
        """What the named modules read and gave in that chunk; `run` was told of all of them."""
        places = self._places[number]
        return Observation(
            {
                name: self._tensors[places["read", name]].to(self._device).float()
                for name in inputs
                if ("read", name) in places
            },
            {name: self._output(number, name).to(self._device) for name in outputs},
        )

    def _output(self, number: int, name: str) -> Tensor:
        if name == BLOCK:
            return self.outputs[number].hidden.flatten(0, -2)
        return self._tensors[self._places[number]["gave", name]]

    def _note(self, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        places = {}
        for key, tensor in tensors.items():
            places[key] = len(self._tensors)
            self._tensors.append(tensor)
        self._places.append(places)


def _shortened(block: nn.Module, name: str, states: Tensor) -> Tensor:
    is_linear = isinstance(block.get_submodule(name), nn.Linear)
    return states.to(product_dtype(states.device)) if is_linear else states


class CurrentBlock:
    """The block that is quantized in place, of that index in the model, and the chunks that go into it."""

    def __init__(self, block: nn.Module, index: int, chunks: Chunks, scratch: Scratch) -> None:
        self.block = block
        self.index = index
        self.chunks = chunks
        self._scratch = scratch
        self._settled: dict[ClosedChild, _SettledInputs] = {}

    def settle(self, children: Collection[ClosedChild]) -> None:
        """From now on nothing changes what the linears that close these children read; it is noted at the next run."""
        self._settled |= {child: _SettledInputs(self._scratch) for child in children if child not in self._settled}

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
            if number in kept.places:
                module = self.block.get_submodule(child.name)
                # in the module itself rather than in its place: blocks read settings of their attention
                vars(module)["forward"] = _Replay(closing, kept.tensors[kept.places[number]], child)
                replayed.append(module)
            else:
                hooks.append(closing.register_forward_pre_hook(_noting(kept, number)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in replayed:
                del vars(module)["forward"]


class _SettledInputs:
    """What the linear that closes a child reads to the end. places: in the tensors, by the number of the chunk."""

    def __init__(self, scratch: Scratch) -> None:
        self.tensors = KeptTensors(scratch)
        self.places: dict[int, int] = {}


def _noting(kept: _SettledInputs, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        kept.places[number] = len(kept.tensors)
        kept.tensors.append(arguments[0].to(product_dtype(arguments[0].device)))

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
        weight = self._closing.get_parameter("weight")
        states = self._states.to(weight.device).to(weight.dtype)
        output = type(self._closing).forward(self._closing, states) if is_linear else self._closing(states)
        return output if self._child.num_others is None else (output, *[None] * self._child.num_others)


@dataclass(frozen=True)
class BlockPair:
    """Both, with the same chunks on their two ways."""

    original: OriginalBlock
    current: CurrentBlock
