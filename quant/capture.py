"""Runs blocks over the calibration tokens and sums up what their linears read. It changes no weight.

Legend: B = sequences of a chunk, T = tokens of a sequence, K = in features of a linear.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quant.errors import SourceError
from quant.linear_experts import Expert, LinearExperts
from quant.model_structure import BlockStack

# tokens that go through a block at a time: enough to fill the cores, few enough to stay small in memory
CHUNK_TOKENS = 2048
# an expert that saw fewer tokens than this is known too little from them, and is shown all
MIN_EXPERT_TOKENS = 256
# what decoders call the cache that they hand to a block
CACHE_ARGUMENTS = ("past_key_values", "layer_past")


@dataclass(frozen=True)
class InputStatistics:
    """What is kept of a linear's input X [tokens, K]: gram = X^T X / tokens [K, K] and mean |x| [K], both float32."""

    gram: Tensor
    mean_magnitude: Tensor


@dataclass(frozen=True)
class BlockContext:
    """What the decoder hands a block beside the hidden states (positions, mask), as it handed it."""

    positional: tuple[object, ...]
    named: dict[str, object]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for hidden states [B, T, hidden]; some blocks return it first in a tuple."""
        output: object = block(hidden, *self.positional, **self.named)
        if isinstance(output, tuple):
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(block).__name__} returns {type(output).__name__}, not hidden states")
        return output


@dataclass(frozen=True)
class BlockInput:
    """The hidden states [B, T, hidden] of one chunk on its way through the blocks, and the context of each block."""

    hidden: Tensor
    contexts: tuple[BlockContext, ...]


@dataclass(frozen=True)
class CapturedBlock:
    """What one pass over a block gives: the chunks as it leaves them, and statistics by linear name."""

    outputs: list[BlockInput]
    statistics: dict[str, InputStatistics]


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


class StatisticsSum:
    """Adds up the statistics of one linear's input, in float32 whatever the dtype of the states."""

    def __init__(self, num_features: int) -> None:
        self._gram = torch.zeros(num_features, num_features)
        self._magnitude = torch.zeros(num_features)
        self._num_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count the inputs [..., K] of a call."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._gram.addmm_(rows.T, rows)
        self._magnitude += rows.abs().sum(dim=0)
        self._num_tokens += rows.shape[0]

    @property
    def num_tokens(self) -> int:
        """How many have been counted."""
        return self._num_tokens

    def result(self) -> InputStatistics:
        """The means over all tokens counted. Where there were none, every channel counts the same."""
        if self._num_tokens == 0:
            return InputStatistics(torch.eye(len(self._gram)), torch.ones_like(self._magnitude))
        return InputStatistics(gram=self._gram / self._num_tokens, mean_magnitude=self._magnitude / self._num_tokens)


def embed(stack: BlockStack, token_ids: Tensor) -> list[BlockInput]:
    """Token ids int64 [sequences, T] as the inputs of the first block, in chunks of about CHUNK_TOKENS.

    The blocks are not run. Raises SourceError when the decoder does more between blocks than hand states on.
    """
    returns_tuple = _returns_tuple(stack, token_ids[:1, :1])
    recorders = [BlockRecorder(returns_tuple=returns_tuple) for _ in stack.blocks]
    chunks = torch.split(token_ids, max(1, CHUNK_TOKENS // token_ids.shape[1]))
    with _replaced_blocks(stack, recorders):
        for chunk in chunks:
            stack.decoder(chunk, use_cache=False)
    for recorder in recorders:
        if any(own is not first for own, first in zip(recorder.hidden, recorders[0].hidden, strict=True)):
            raise SourceError(
                f"{type(stack.decoder).__name__} changes the states between its blocks, so they cannot be searched one "
                "by one; use --method rtn"
            )
    return [
        BlockInput(recorders[0].hidden[index], tuple(recorder.contexts[index] for recorder in recorders))
        for index in range(len(chunks))
    ]


def capture(block: nn.Module, block_index: int, inputs: Sequence[BlockInput], names: Sequence[str]) -> CapturedBlock:
    """Run the block over all chunks: its outputs, and the statistics of what each named module reads.

    Named modules have a weight [N, K]. An expert that few tokens reached is shown all tokens in a second run.
    """
    sums = {name: _sum_for(block, name) for name in names}
    hooks = [block.get_submodule(name).register_forward_pre_hook(_counting(total)) for name, total in sums.items()]
    outputs = _run_hooked(block, block_index, inputs, hooks)
    starved = [name for name, total in sums.items() if total.num_tokens < MIN_EXPERT_TOKENS]
    sums |= _count_all_tokens(block, block_index, inputs, starved)
    return CapturedBlock(outputs, {name: total.result() for name, total in sums.items()})


def readers_by_tensor(
    block: nn.Module, block_index: int, chunk: BlockInput, names: Sequence[str]
) -> list[tuple[str, ...]]:
    """The named modules in sets: those that read the very same tensor are together. Modules that do not run are out."""
    read: list[tuple[Tensor, str]] = []
    hooks = [block.get_submodule(name).register_forward_pre_hook(_noting(name, read)) for name in names]
    _run_hooked(block, block_index, [chunk], hooks)
    # `read` holds the tensors, so no two of them have had one address
    readers: dict[int, list[str]] = {}
    for tensor, name in read:
        readers.setdefault(id(tensor), []).append(name)
    return [tuple(dict.fromkeys(together)) for together in readers.values()]


def run_block(block: nn.Module, block_index: int, chunk: BlockInput) -> BlockInput:
    """The chunk as the block of that index leaves it: the input of the next one."""
    return BlockInput(chunk.contexts[block_index].run(block, chunk.hidden), chunk.contexts)


def _count_all_tokens(
    block: nn.Module, block_index: int, inputs: Sequence[BlockInput], starved: Sequence[str]
) -> dict[str, StatisticsSum]:
    """Sums for the starved among the linears of experts: what they would read if every token went there."""
    sums: dict[str, StatisticsSum] = {}
    hooks = []
    for name, experts in block.named_modules():
        if isinstance(experts, LinearExperts):
            for number, expert in experts.named_experts().items():
                prefix = f"{name}.{number}."
                own = {linear.removeprefix(prefix): linear for linear in starved if linear.startswith(prefix)}
                if own:
                    shown = {linear: _sum_for(block, full) for linear, full in own.items()}
                    sums |= {own[linear]: total for linear, total in shown.items()}
                    hooks.append(experts.register_forward_pre_hook(_showing(expert, shown)))
    if sums:
        _run_hooked(block, block_index, inputs, hooks)
    return sums


def _run_hooked(
    block: nn.Module, block_index: int, inputs: Sequence[BlockInput], hooks: Sequence[RemovableHandle]
) -> list[BlockInput]:
    try:
        return [run_block(block, block_index, chunk) for chunk in inputs]
    finally:
        for hook in hooks:
            hook.remove()


def _sum_for(block: nn.Module, name: str) -> StatisticsSum:
    return StatisticsSum(block.get_submodule(name).get_parameter("weight").shape[1])


def _counting(total: StatisticsSum) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def count(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        total.add(arguments[0])

    return count


def _noting(name: str, read: list[tuple[Tensor, str]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        read.append((arguments[0], name))

    return note


def _showing(expert: Expert, sums: Mapping[str, StatisticsSum]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def show(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        read = expert.inputs(arguments[0])
        for name, total in sums.items():
            total.add(read[name])

    return show


def _returns_tuple(stack: BlockStack, token_ids: Tensor) -> bool:
    """Whether blocks return their states in a tuple: what the first one does with a token or two."""
    seen: list[bool] = []
    first, *others = stack.blocks.values()
    hook = first.register_forward_hook(lambda _module, _arguments, output: seen.append(isinstance(output, tuple)))
    try:
        with _replaced_blocks(stack, [first for _ in (first, *others)]):
            stack.decoder(token_ids, use_cache=False)
    finally:
        hook.remove()
    return all(seen)


@contextmanager
def _replaced_blocks(stack: BlockStack, replacement: Sequence[nn.Module]) -> Iterator[None]:
    blocks = stack.decoder.get_submodule(stack.attribute)
    stack.decoder.add_module(stack.attribute, nn.ModuleList(replacement))
    try:
        yield
    finally:
        stack.decoder.add_module(stack.attribute, blocks)
