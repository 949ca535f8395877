"""Kept tensors: the same whether memory holds them or a file, and nothing of it is left."""

from pathlib import Path

import pytest
import torch

from quant.capture import BlockInput
from quant.errors import WriteError
from quant.kept_states import KeptChunks
from quant.kept_tensors import KeptTensors, Scratch

TENSORS = [
    torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    torch.arange(7),
    torch.linspace(-1, 1, 24).view(2, 3, 4).bfloat16(),
    # not contiguous
    torch.arange(12.0).view(3, 4).T,
]


@pytest.mark.parametrize("memory_bytes", [0, 60, 2**20])
def test_what_comes_back_is_what_was_kept(memory_bytes: int, tmp_path: Path) -> None:
    # given memory for none, for the first, or for all of them
    kept = KeptTensors(Scratch(tmp_path, memory_bytes))
    for tensor in TENSORS:
        kept.append(tensor)
    assert len(kept) == len(TENSORS)
    # in any order, any number of times
    for index in (3, 0, 2, 1, 0):
        assert kept[index].dtype == TENSORS[index].dtype
        assert torch.equal(kept[index], TENSORS[index])
    # a file without a name: a killed program leaves none
    assert not list(tmp_path.iterdir())


def test_chunks_are_a_sequence_that_ends(tmp_path: Path) -> None:
    chunks = KeptChunks(Scratch(tmp_path, memory_bytes=0), [BlockInput(tensor, ()) for tensor in TENSORS])
    assert [chunk.hidden.shape for chunk in chunks] == [tensor.shape for tensor in TENSORS]
    assert len(chunks) == len(TENSORS)


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    kept = KeptTensors(Scratch(tmp_path / "gone", memory_bytes=0))
    with pytest.raises(WriteError, match="gone"):
        kept.append(TENSORS[0])
