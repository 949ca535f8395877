"""Where a causal language model keeps its blocks, and what its checkpoint calls them. It changes nothing.

No architecture is named here: both follow from the model as transformers builds it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel

from quant.errors import SourceError


@dataclass(frozen=True)
class BlockStack:
    """A model's blocks in order. decoder: embeds token ids and runs the blocks, which it holds in `attribute`.

    name: the name of the blocks' list in the model. width: of the hidden states.
    """

    decoder: nn.Module
    attribute: str
    name: str
    width: int

    @property
    def module_list(self) -> nn.Module:
        """The blocks as the decoder holds them."""
        return self.decoder.get_submodule(self.attribute)

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by full name."""
        return {f"{self.name}.{name}": block for name, block in self.module_list.named_children()}


def find_blocks(model: PreTrainedModel) -> BlockStack:
    """The module list as long as the config says there are layers; the heaviest, where there are several.

    Raises SourceError when there is none.
    """
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    if not lists:
        raise SourceError(
            f"model type {model.config.model_type!r} cannot be quantized: it has no list of {num_layers} blocks"
        )
    name = max(lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    parent, _, attribute = name.rpartition(".")
    return BlockStack(decoder=model.get_submodule(parent), attribute=attribute, name=name, width=config.hidden_size)


def stored_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model as its checkpoints hold them: under other names in some families, or cut in several."""
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return stored


def stored_modules(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """What the model's checkpoints call these linear modules, by their name in the model."""
    ordered = list(names)
    numbered = {f"{name}.weight": torch.tensor(number) for number, name in enumerate(ordered)}
    stored = stored_tensors(model, numbered)
    return {ordered[int(number)]: name.removesuffix(".weight") for name, number in stored.items()}


def head_names(model: PreTrainedModel) -> set[str]:
    """What the model's checkpoints call the weight of its output head; nothing where it has none."""
    return {f"{name}.weight" for name in stored_modules(model, find_heads(model)).values()}


def find_head(model: PreTrainedModel) -> str:
    """The full name of the linear that makes the logits. Raises SourceError when there is none."""
    names = [name for name, module in find_heads(model).items() if isinstance(module, nn.Linear)]
    if not names:
        raise SourceError(
            f"model type {model.config.model_type!r} has no output head that is a linear layer; leave out --lm-head"
        )
    return names[0]


def untie(model: PreTrainedModel, name: str) -> None:
    """Give the linear of that name a weight of its own, where it shared one with the embedding; the values stay."""
    linear = model.get_submodule(name)
    linear.register_parameter("weight", nn.Parameter(linear.get_parameter("weight").detach().clone()))


def find_heads(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The module that makes the logits, by its full name; nothing where the model has none."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {name: module for name, module in model.named_modules() if module is head}
