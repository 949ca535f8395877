"""Where the original's parameters are read from, one at a time: the files of a directory, or a model in memory.

Legend: V = rows of a tensor, its first dimension.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from quant.checkpoint.tensor_files import StoredTensor, read_rows
from quant.checkpoint.tensor_spec import TensorSpec
from quant.model_structure import stored_tensors

# what is converted from the stored dtype at a time
PIECE_BYTES = 64 * 1024**2


class OriginalWeights(Protocol):
    """The tensors of a model by their full names in it, as it has them before it is quantized. Never written to."""

    @property
    def dtype(self) -> torch.dtype:
        """That most values are stored in."""
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor in that dtype; the caller's own."""
        ...

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """These rows, int64 [R], of a tensor [V, ...] as float32 [R, ...]; the caller's own."""
        ...

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor [V, ...] as float32, some rows after others, so that it is never in memory whole."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """Tensors that stay in their files until they are asked for."""

    tensors: Mapping[str, StoredTensor]

    @property
    def dtype(self) -> torch.dtype:
        """See OriginalWeights."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.spec.dtype] = sizes.get(tensor.spec.dtype, 0) + tensor.spec.num_bytes
        return max(sizes, key=sizes.__getitem__)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See OriginalWeights. At no time is more than the tensor and a piece of it in memory."""
        stored = _at_least_one_row(self.tensors[name])
        made = torch.empty(stored.spec.shape, dtype=dtype)
        for rows in _spans(stored):
            made[rows.start : rows.stop] = _convert(read_rows(stored, rows), dtype)
        return made.view(self.tensors[name].spec.shape)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """See OriginalWeights."""
        return read_rows(self.tensors[name], rows.tolist()).float()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See OriginalWeights."""
        stored = _at_least_one_row(self.tensors[name])
        for rows in _spans(stored):
            yield read_rows(stored, rows).float()


@dataclass(frozen=True)
class HeldWeights:
    """Tensors in memory, in float32."""

    tensors: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """See OriginalWeights."""
        return torch.float32

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See OriginalWeights."""
        return self.tensors[name].to(dtype, copy=True)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """See OriginalWeights."""
        return self.tensors[name][rows]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See OriginalWeights."""
        yield self.tensors[name]


@dataclass(frozen=True)
class RoundedWeights:
    """What became of others: every tensor as `dtype` holds it, but for those that `replaced` has instead."""

    original: OriginalWeights
    rounding: torch.dtype
    replaced: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """See OriginalWeights."""
        return self.original.dtype

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """See OriginalWeights."""
        if name in self.replaced:
            return self.replaced[name].to(dtype, copy=True)
        return self.original.read(name, self.rounding if dtype.is_floating_point else dtype).to(dtype)

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """See OriginalWeights."""
        if name in self.replaced:
            return self.replaced[name][rows]
        return self.original.read_rows(name, rows).to(self.rounding).float()

    def pieces(self, name: str) -> Iterator[Tensor]:
        """See OriginalWeights."""
        if name in self.replaced:
            yield self.replaced[name]
        else:
            yield from (piece.to(self.rounding).float() for piece in self.original.pieces(name))


def find_stored(model: PreTrainedModel, files: Mapping[str, StoredTensor]) -> StoredWeights | None:
    """Where each tensor of the model lies, if its checkpoints hold each as it is, under whatever name.

    None where one is made from several, or is only a part of one, or has a name in these files that does not follow
    from the model.
    """
    own = model.state_dict(keep_vars=True)
    # one for each name, tied or not, so that each can be told from the others
    marked = {name: torch.empty_like(tensor, device="meta") for name, tensor in own.items()}
    names = {id(tensor): name for name, tensor in marked.items()}
    found = {
        names[id(tensor)]: files[stored_name]
        for stored_name, tensor in stored_tensors(model, marked).items()
        if id(tensor) in names and stored_name in files and files[stored_name].spec.shape == tuple(tensor.shape)
    }
    # one tensor of the files is enough for all that are tied
    homes = {id(own[name]): name for name in reversed(own) if name in found}
    found = {name: found[homes[id(tensor)]] for name, tensor in own.items() if id(tensor) in homes}
    return StoredWeights(found) if found.keys() == own.keys() else None


def _convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.float().to(dtype) if tensor.is_floating_point() else tensor.to(dtype)


def _at_least_one_row(stored: StoredTensor) -> StoredTensor:
    """The same of a tensor that may be a single value."""
    if stored.spec.shape:
        return stored
    return StoredTensor(stored.file, TensorSpec((1,), stored.spec.dtype), stored.start)


def _spans(stored: StoredTensor) -> Iterator[range]:
    """The rows of the tensor in spans of about PIECE_BYTES."""
    num_rows = stored.spec.shape[0]
    step = max(1, PIECE_BYTES * num_rows // max(1, stored.spec.num_bytes))
    for start in range(0, num_rows, step):
        yield range(start, min(start + step, num_rows))
