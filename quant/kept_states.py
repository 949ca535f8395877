"""Keeps the hidden states of calibration tokens between blocks: over all tokens they are as large as several blocks."""

from collections.abc import Iterable, Iterator

from quant.capture import BlockContext, BlockInput
from quant.kept_tensors import KeptTensors, Scratch


class KeptChunks:
    """Chunks on their way through the blocks, of which only the hidden states can be in a file."""

    def __init__(self, scratch: Scratch, chunks: Iterable[BlockInput] = ()) -> None:
        self._hidden = KeptTensors(scratch)
        self._contexts: list[tuple[BlockContext, ...]] = []
        for chunk in chunks:
            self.append(chunk)

    def append(self, chunk: BlockInput) -> None:
        """Keep it; nobody may change its states any more."""
        self._hidden.append(chunk.hidden)
        self._contexts.append(chunk.contexts)

    def __len__(self) -> int:
        return len(self._contexts)

    def __getitem__(self, index: int) -> BlockInput:
        return BlockInput(self._hidden[index], self._contexts[index])

    def __iter__(self) -> Iterator[BlockInput]:
        return (self[number] for number in range(len(self)))
