"""A model of which only what runs is in memory: a block at a time, and a module at a time outside of the blocks."""

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quant.capture import BlockInput, StateGiver, embed, gives_tuples, replaced_blocks
from quant.device import HOST
from quant.model_structure import BlockStack, find_blocks
from quant.original_weights import OriginalWeights
from quant.outer_modules import outer_weights, put_tensor

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class BlockwiseModel:
    """model: all its parameters are on the meta device, which has no memory; weights: where they are read from.

    device: where its blocks are loaded to, and what comes after them runs. What comes before them runs on the host.
    """

    model: PreTrainedModel
    weights: OriginalWeights
    device: torch.device = HOST

    @property
    def stack(self) -> BlockStack:
        """The blocks, without their weights. Raises SourceError when there are none."""
        return find_blocks(self.model)

    def load_block(self, index: int) -> nn.Module:
        """The block of that index with its weights in float32, as a module of its own."""
        return self._load_block(index, self.device)

    def load_whole(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model with all its weights in that dtype on the device, as one of its own."""
        return materialise(self.model, "", self.weights, dtype, device)

    def restore_block(self, block: nn.Module, index: int, names: Collection[str]) -> None:
        """Give these parameters of what load_block gave for that index the source's values again, in place."""
        block_name = list(self.stack.blocks)[index]
        with torch.no_grad():
            for name in names:
                parameter = block.get_parameter(name)
                parameter.copy_(self.weights.read(f"{block_name}.{name}", parameter.dtype))

    def embed(self, token_ids: Tensor) -> Iterator[BlockInput]:
        """The inputs of the first block (capture.embed) for token ids int64 [sequences, T], chunk by chunk."""
        with self._first_block() as stack, outer_weights(self.model, stack, self.weights):
            yield from embed(stack, token_ids)

    def run_outer(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """The logits [B, T, V], on `device`, where the last block gives states [B, T, hidden] for token ids [B, T]."""
        stack = self.stack
        giver = StateGiver(states.to(self.device), returns_tuple=self._gives_tuples)
        with outer_weights(self.model, stack, self.weights), replaced_blocks(stack, [giver for _ in stack.blocks]):
            logits: Tensor = self.model(token_ids, use_cache=False).logits
        return logits

    @cached_property
    def _gives_tuples(self) -> bool:
        with self._first_block() as stack, outer_weights(self.model, stack, self.weights):
            return gives_tuples(stack, torch.zeros(1, 1, dtype=torch.int64))

    def _load_block(self, index: int, device: torch.device) -> nn.Module:
        name, block = list(self.stack.blocks.items())[index]
        return materialise(block, name, self.weights, torch.float32, device)

    @contextmanager
    def _first_block(self) -> Iterator[BlockStack]:
        """The blocks with the first in memory, on the host: there is what it reads."""
        stack = self.stack
        first, *_ = stack.module_list.named_children()
        stack.module_list.add_module(first[0], self._load_block(0, HOST))
        try:
            yield stack
        finally:
            stack.module_list.add_module(*first)


def hold_nothing(model: PreTrainedModel) -> dict[str, Tensor]:
    """Move what checkpoints hold of the model to the meta device; returns the tensors as they were, by full name."""
    tensors = dict(model.state_dict(keep_vars=True))
    _replace_tensors(model, lambda _name, tensor: tensor.detach().to("meta"))
    return {name: tensor.detach() for name, tensor in tensors.items()}


def materialise(
    module: ModuleT, name: str, weights: OriginalWeights, dtype: torch.dtype, device: torch.device
) -> ModuleT:
    """A copy of the module of that full name with its weights, in dtype, on the device; other tensors keep theirs."""
    made = copy.deepcopy(module)

    def read(own: str, tensor: Tensor) -> Tensor:
        is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return weights.read(f"{name}.{own}".removeprefix("."), dtype if is_weight else tensor.dtype).to(device)

    _replace_tensors(made, read)
    # what is computed and not stored has no weights to be read
    for owner in made.modules():
        for attribute, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, attribute, buffer.to(device))
    return made


def _replace_tensors(module: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put what `make` gives for its name and itself in the place of each tensor; what is one tensor stays one."""
    made: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        parent, _, attribute = name.rpartition(".")
        home = module.get_submodule(parent)
        if id(tensor) not in made:
            value = make(name, tensor)
            made[id(tensor)] = (
                nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
            )
        put_tensor(home, attribute, made[id(tensor)])
