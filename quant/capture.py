"""Runs blocks over the calibration tokens and sums up what their linears read. It changes no weight.

Legend: B = sequences of a chunk, T = tokens of a sequence, K = in features of a linear.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quant.scale_groups import linear_of

# tokens that go through a block at a time: enough to fill the cores, few enough to stay small in memory
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class InputStatistics:
    """What is kept of a linear's input X [tokens, K]: gram = X^T X / tokens [K, K] and mean |x| [K], both float32."""

    gram: Tensor
    mean_magnitude: Tensor


@dataclass(frozen=True)
class BlockContext:
    """What the decoder hands a block beside the hidden states (positions, mask), as it handed it."""

    arguments: dict[str, object]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for hidden states [B, T, hidden]."""
        output = block(hidden, **self.arguments)
        if not isinstance(output, Tensor):
            raise TypeError(f"{type(block).__name__} returns {type(output).__name__}, not one tensor of hidden states")
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

    def __init__(self) -> None:
        super().__init__()
        self.hidden: list[Tensor] = []
        self.contexts: list[BlockContext] = []

    def forward(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        """Keep the arguments, without a cache that would grow from run to run."""
        self.hidden.append(hidden_states)
        self.contexts.append(BlockContext({**arguments, "past_key_values": None, "use_cache": False}))
        return hidden_states


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

    def result(self) -> InputStatistics:
        """The means over all tokens counted; at least one must have been."""
        return InputStatistics(gram=self._gram / self._num_tokens, mean_magnitude=self._magnitude / self._num_tokens)


def embed(decoder: nn.Module, token_ids: Tensor) -> list[BlockInput]:
    """Token ids int64 [sequences, T] as the inputs of the first block, in chunks of about CHUNK_TOKENS.

    decoder: the model without its head, with its blocks in `layers`; they are not run.
    """
    recorders = [BlockRecorder() for _ in decoder.get_submodule("layers").children()]
    chunks = torch.split(token_ids, max(1, CHUNK_TOKENS // token_ids.shape[1]))
    with _replaced_blocks(decoder, nn.ModuleList(recorders)):
        for chunk in chunks:
            decoder(chunk, use_cache=False)
    return [
        BlockInput(recorders[0].hidden[index], tuple(recorder.contexts[index] for recorder in recorders))
        for index in range(len(chunks))
    ]


def capture(
    block: nn.Module, block_index: int, inputs: Sequence[BlockInput], linear_names: Sequence[str]
) -> CapturedBlock:
    """Run the block over all chunks: its outputs, and the statistics of what each named linear reads."""
    sums = {name: StatisticsSum(linear_of(block, name).in_features) for name in linear_names}
    hooks = [linear_of(block, name).register_forward_pre_hook(_counting(total)) for name, total in sums.items()]
    try:
        outputs = [run_block(block, block_index, chunk) for chunk in inputs]
    finally:
        for hook in hooks:
            hook.remove()
    return CapturedBlock(outputs, {name: total.result() for name, total in sums.items()})


def run_block(block: nn.Module, block_index: int, chunk: BlockInput) -> BlockInput:
    """The chunk as the block of that index leaves it: the input of the next one."""
    return BlockInput(chunk.contexts[block_index].run(block, chunk.hidden), chunk.contexts)


def _counting(total: StatisticsSum) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def count(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        total.add(arguments[0])

    return count


@contextmanager
def _replaced_blocks(decoder: nn.Module, replacement: nn.ModuleList) -> Iterator[None]:
    blocks = decoder.get_submodule("layers")
    decoder.add_module("layers", replacement)
    try:
        yield
    finally:
        decoder.add_module("layers", blocks)
