"""Runs blocks over the calibration tokens and tells what their modules read and give. It changes no weight.

Legend: B = sequences of a chunk, T = tokens of a sequence, K = in features of a module, N = its out features.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.device import HOST, device_of
from quant.errors import SourceError
from quant.model_structure import BlockStack

# tokens that go through a block at a time: enough to fill the cores, few enough to stay small in memory
CHUNK_TOKENS = 2048
# what their states take: an MLP in float32 holds some ten times as much at once
CHUNK_BYTES = 2**23
# the first chunk is what a block is tried on, again and again: so many tells whether two outputs are the same
FIRST_CHUNK_TOKENS = 512
# what decoders call the cache that they hand to a block
CACHE_ARGUMENTS = ("past_key_values", "layer_past")


@dataclass(frozen=True)
class BlockContext:
    """What the decoder hands a block beside the hidden states (positions, mask), as it handed it."""

    positional: tuple[object, ...]
    named: dict[str, object]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for hidden states [B, T, hidden], on its device; some return it first in a tuple."""
        device = device_of(block)
        positional = [_moved(value, device) for value in self.positional]
        named = {name: _moved(value, device) for name, value in self.named.items()}
        output: object = block(hidden.to(device), *positional, **named)
        if isinstance(output, tuple):
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(block).__name__} returns {type(output).__name__}, not hidden states")
        return output


@dataclass(frozen=True)
class BlockInput:
    """The hidden states [B, T, hidden] of one chunk on its way through the blocks, and the context of each block.

    Both are on the host, wherever blocks are.
    """

    hidden: Tensor
    contexts: tuple[BlockContext, ...]


class Chunks(Protocol):
    """Chunks in their order: a list, or one that memory does not hold whole."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> BlockInput: ...

    def __iter__(self) -> Iterator[BlockInput]: ...


@dataclass(frozen=True)
class Observation:
    """What named modules of a block read, as [tokens, K], and gave, as [tokens, N]: float32, of one chunk.

    It is on the block's device, but where it is kept for long.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Child:
    """A module that the block holds itself, by its name in it."""

    name: str


@dataclass(frozen=True)
class ClosedChild(Child):
    """One that ends with a linear: it gives that one's output, in a tuple with num_others times None if that is given.

    closing: the linear's name in the block; the child's own where it is a linear itself.
    """

    closing: str
    num_others: int | None


class BlockRecorder(nn.Module):
    """Stands in for a block: passes the hidden states on untouched and keeps what the decoder handed over."""

    def __init__(self, *, returns_tuple: bool) -> None:
        super().__init__()
        self._returns_tuple = returns_tuple
        self.hidden: list[Tensor] = []
        self.contexts: list[BlockContext] = []

    def forward(self, hidden_states: Tensor, *positional: object, **named: object) -> Tensor | tuple[Tensor]:
        """Keep the arguments, without a cache that would grow from run to run."""
        self.hidden.append(hidden_states)
        self.contexts.append(BlockContext(positional, {**named, **dict.fromkeys(named.keys() & CACHE_ARGUMENTS)}))
        return (hidden_states,) if self._returns_tuple else hidden_states


class StateGiver(nn.Module):
    """Stands in for a block, and gives the same hidden states whatever it reads."""

    def __init__(self, hidden: Tensor, *, returns_tuple: bool) -> None:
        super().__init__()
        self._hidden = hidden
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *_positional: object, **_named: object) -> Tensor | tuple[Tensor]:  # noqa: ARG002
        """What a block returns."""
        return (self._hidden,) if self._returns_tuple else self._hidden


class _SeenAllError(Exception):
    """Ends the run of a block of which nothing more is wanted."""


def split_sequences(token_ids: Tensor, width: int) -> tuple[Tensor, ...]:
    """Token ids int64 [sequences, T] in chunks for states of that width, the first of about FIRST_CHUNK_TOKENS.

    The others have about CHUNK_TOKENS, or fewer where those would be wider than CHUNK_BYTES.
    """
    most = min(CHUNK_TOKENS, CHUNK_BYTES // (torch.float32.itemsize * width))
    num_first, num_others = (max(1, num_tokens // token_ids.shape[1]) for num_tokens in (FIRST_CHUNK_TOKENS, most))
    others = token_ids[num_first:]
    return (token_ids[:num_first], *(torch.split(others, num_others) if len(others) else ()))


def embed(stack: BlockStack, token_ids: Tensor) -> Iterator[BlockInput]:
    """Token ids int64 [sequences, T] as the inputs of the first block, in the chunks of `split_sequences`, one by one.

    The blocks are not run. Raises SourceError when the decoder does more between blocks than hand states on.
    """
    wraps = gives_tuples(stack, token_ids[:1, :1])
    for chunk in split_sequences(token_ids, stack.width):
        recorders = [BlockRecorder(returns_tuple=wraps) for _ in stack.blocks]
        with replaced_blocks(stack, recorders):
            stack.decoder(chunk, use_cache=False)
        hidden = recorders[0].hidden[0]
        if any(recorder.hidden[0] is not hidden for recorder in recorders):
            raise SourceError(
                f"{type(stack.decoder).__name__} changes the states between its blocks, so they cannot be searched one "
                "by one; use --method rtn"
            )
        yield BlockInput(hidden, tuple(recorder.contexts[0] for recorder in recorders))


def observe(
    block: nn.Module, block_index: int, chunk: BlockInput, inputs: Collection[str], outputs: Collection[str] = ()
) -> Observation:
    """Run the block on the chunk until all named modules have been seen. The block's own name is "".

    Modules that do not run are left out; one that runs more than once shows its first time.
    """
    read: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def stop_when_all_seen() -> None:
        if len(read) == len(inputs) and len(given) == len(outputs):
            raise _SeenAllError

    def reading(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            read.setdefault(name, _as_rows(arguments[0]))
            stop_when_all_seen()

        return note

    def giving(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        def note(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            states = _as_rows(output[0] if isinstance(output, tuple) else output)
            # a copy of what some blocks go on to change in place: they add attention to the MLP's output
            given.setdefault(name, states.clone() if name else states)
            stop_when_all_seen()

        return note

    hooks = [block.get_submodule(name).register_forward_pre_hook(reading(name)) for name in inputs]
    hooks += [block.get_submodule(name).register_forward_hook(giving(name)) for name in outputs]
    with suppress(_SeenAllError):
        run_hooked(block, block_index, chunk, hooks)
    return Observation(read, given)


def readers_by_tensor(
    block: nn.Module, block_index: int, chunk: BlockInput, names: Sequence[str]
) -> list[tuple[str, ...]]:
    """The named modules in sets: those that read the very same tensor are together. Modules that do not run are out."""
    read: list[tuple[Tensor, str]] = []
    hooks = [block.get_submodule(name).register_forward_pre_hook(_noting(name, read)) for name in names]
    run_hooked(block, block_index, chunk, hooks)
    # `read` holds the tensors, so no two of them have had one address
    readers: dict[int, list[str]] = {}
    for tensor, name in read:
        readers.setdefault(id(tensor), []).append(name)
    return [tuple(dict.fromkeys(together)) for together in readers.values()]


def running_order(block: nn.Module, block_index: int, chunk: BlockInput) -> tuple[Child, ...]:
    """The block's children in the order in which they run on the chunk, up to the first that runs twice."""
    given: list[tuple[str, Tensor]] = []
    ran: list[Child] = []

    def by_linear(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _arguments, output: given.append((name, output))

    def by_child(name: str) -> Callable[[nn.Module, object, object], None]:
        def note(_module: nn.Module, _arguments: object, output: object) -> None:
            first, *others = output if isinstance(output, tuple) else (output,)
            inside = [linear for linear, states in given if states is first and f"{linear}.".startswith(f"{name}.")]
            num_others = len(others) if isinstance(output, tuple) else None
            closed = bool(inside) and all(other is None for other in others)
            ran.append(ClosedChild(name, inside[-1], num_others) if closed else Child(name))

        return note

    linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    hooks = [linear.register_forward_hook(by_linear(name)) for name, linear in linears]
    hooks += [child.register_forward_hook(by_child(name)) for name, child in block.named_children()]
    run_hooked(block, block_index, chunk, hooks)
    names = [child.name for child in ran]
    return tuple(itertools.takewhile(lambda child: names.count(child.name) == 1, ran))


def run_block(block: nn.Module, block_index: int, chunk: BlockInput) -> BlockInput:
    """The chunk as the block of that index leaves it: the input of the next one."""
    return BlockInput(chunk.contexts[block_index].run(block, chunk.hidden).to(HOST), chunk.contexts)


def run_hooked(block: nn.Module, block_index: int, chunk: BlockInput, hooks: Sequence[RemovableHandle]) -> BlockInput:
    """run_block under hooks, which are removed whatever happens."""
    try:
        return run_block(block, block_index, chunk)
    finally:
        for hook in hooks:
            hook.remove()


def _moved(value: object, device: torch.device) -> object:
    """The same with its tensors on the device: itself, or those in tuples, lists and dicts."""
    if device == HOST:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value


def _as_rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1]).float()


def _noting(name: str, read: list[tuple[Tensor, str]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        read.append((arguments[0], name))

    return note


def gives_tuples(stack: BlockStack, token_ids: Tensor) -> bool:
    """Whether blocks return their states in a tuple: what the first one does with a token or two."""
    seen: list[bool] = []
    first, *others = stack.blocks.values()
    hook = first.register_forward_hook(lambda _module, _arguments, output: seen.append(isinstance(output, tuple)))
    try:
        with replaced_blocks(stack, [first for _ in (first, *others)]):
            stack.decoder(token_ids, use_cache=False)
    finally:
        hook.remove()
    return all(seen)


@contextmanager
def replaced_blocks(stack: BlockStack, replacement: Sequence[nn.Module]) -> Iterator[None]:
    """The decoder with other modules in the place of its blocks."""
    blocks = stack.decoder.get_submodule(stack.attribute)
    stack.decoder.add_module(stack.attribute, nn.ModuleList(replacement))
    try:
        yield
    finally:
        stack.decoder.add_module(stack.attribute, blocks)
