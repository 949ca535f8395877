"""Gives the modules outside of a model's blocks their weights for as long as each runs. It changes none of them.

An embedding gets the rows that are asked of it, and the output head is multiplied with piece by piece: in many models
either is larger than a block.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import PreTrainedModel

from quant.device import HOST
from quant.model_structure import BlockStack, find_heads
from quant.original_weights import OriginalWeights


class StreamedHead(nn.Linear):
    """Stands in for the linear of that name: reads its weight while it multiplies."""

    def __init__(self, linear: nn.Linear, name: str, weights: OriginalWeights) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self._name = name
        self._weights = weights

    def forward(self, states: Tensor) -> Tensor:
        """[..., K] to [..., V]."""
        made = states.new_empty(*states.shape[:-1], self.out_features)
        start = 0
        for piece in self._weights.pieces(f"{self._name}.weight"):
            made[..., start : start + len(piece)] = functional.linear(states, piece.to(states.device))
            start += len(piece)
        return made if self.bias is None else made + self._read_bias(made)

    def _read_bias(self, like: Tensor) -> Tensor:
        return self._weights.read(f"{self._name}.bias", like.dtype).to(like.device)


@contextmanager
def outer_weights(model: PreTrainedModel, stack: BlockStack, weights: OriginalWeights) -> Iterator[None]:
    """While it lasts, what is outside of the blocks can be run; the blocks cannot."""
    heads = {name: head for name, head in find_heads(model).items() if isinstance(head, nn.Linear)}
    embedding = model.get_input_embeddings()
    with ExitStack() as undo:
        for name, head in heads.items():
            model.set_submodule(name, StreamedHead(head, name, weights))
            undo.callback(model.set_submodule, name, head)
        for name, module in model.named_modules():
            if name not in heads and not name.startswith(f"{stack.name}."):
                own = {attribute: tensor for attribute, tensor in _own_tensors(module).items() if tensor.is_meta}
                if own:
                    loader = _Loader(name, own, weights, by_rows=module is embedding)
                    undo.callback(module.register_forward_pre_hook(loader.load).remove)
                    undo.callback(module.register_forward_hook(loader.drop).remove)
        yield


class _Loader:
    """Hooks of one module: its tensors come when it is called, to where its input is, and go when it has run."""

    def __init__(self, name: str, own: dict[str, Tensor], weights: OriginalWeights, *, by_rows: bool) -> None:
        self._name = name
        self._own = own
        self._weights = weights
        self._by_rows = by_rows

    def load(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Before the module runs."""
        device = next((argument.device for argument in arguments if isinstance(argument, Tensor)), HOST)
        for attribute, tensor in self._own.items():
            name = f"{self._name}.{attribute}".removeprefix(".")
            if self._by_rows and attribute == "weight" and arguments:
                value = self._rows_of(name, tensor, torch.unique(arguments[0]))
            else:
                value = self._weights.read(name, tensor.dtype).to(device)
            is_parameter = isinstance(tensor, nn.Parameter)
            put_tensor(module, attribute, nn.Parameter(value, tensor.requires_grad) if is_parameter else value)

    def drop(self, module: nn.Module, _arguments: tuple[Tensor, ...], _output: object) -> None:
        """After it has run."""
        for attribute, tensor in self._own.items():
            put_tensor(module, attribute, tensor)

    def _rows_of(self, name: str, like: Tensor, rows: Tensor) -> Tensor:
        """A tensor of which only these rows are filled: the system gives memory to no others."""
        made = torch.empty(like.shape, dtype=like.dtype)
        made[rows] = self._weights.read_rows(name, rows)
        return made


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of the module itself, not of its children."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if "." not in name}


def put_tensor(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Make the tensor the module's own of that name: a parameter if it is one, else a buffer."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
    else:
        module.register_buffer(attribute, tensor)
