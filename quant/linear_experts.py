"""Experts as linears of their own, where transformers holds all of a block's in two tensors; the function stays.

A checkpoint holds each expert's three matrices under names of their own, and quantization works on linears.
"""

import torch
from torch import Tensor, nn

from quant.errors import SourceError
from quant.scale_groups import ExpertNames

# what transformers calls an experts module's tensors: [E, 2 I, H] with the gates above, and [E, H, I]
GATE_UP, DOWN = "gate_up_proj", "down_proj"


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), its linears under the checkpoint's names."""

    def __init__(self, names: ExpertNames, gate_up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self._names = names
        gate, up = gate_up.chunk(2)
        self.add_module(names.gate, _linear(gate))
        self.add_module(names.up, _linear(up))
        self.add_module(names.down, _linear(down))
        self.act_fn = activation

    @property
    def down_name(self) -> str:
        """The name of the linear that reads what the expert made of its input."""
        return self._names.down

    def activations(self, hidden_states: Tensor) -> Tensor:
        """What the down projection reads: [tokens, H] to [tokens, I]."""
        gated: Tensor = self.act_fn(self.get_submodule(self._names.gate)(hidden_states))
        return torch.mul(gated, self.get_submodule(self._names.up)(hidden_states))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, H] to [tokens, H]."""
        output: Tensor = self.get_submodule(self._names.down)(self.activations(hidden_states))
        return output


class LinearExperts(nn.ModuleList):
    """All experts of a block, called as transformers calls its own experts module."""

    def by_down_name(self) -> dict[str, Expert]:
        """The experts by the names of their down projections here: 3.down_proj."""
        experts = ((number, expert) for number, expert in self.named_children() if isinstance(expert, Expert))
        return {f"{number}.{expert.down_name}": expert for number, expert in experts}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts; hidden_states [tokens, H], the other two [tokens, k]."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, choices = torch.where(top_k_index == number)
            if len(tokens):
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, choices, None]
                output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def linearize_experts(model: nn.Module, names: ExpertNames) -> None:
    """Replace every experts module of the model in place; the new weights share the old ones' memory.

    Raises SourceError naming the module that is built another way than the family's experts are.
    """
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, GATE_UP)]
    for name, experts in found:
        tensors = dict(experts.named_parameters(recurse=False))
        if tensors.keys() != {GATE_UP, DOWN} or any(tensor.dim() != 3 for tensor in tensors.values()):
            raise SourceError(f"{name} holds experts in a way that is not known: {', '.join(tensors)}")
        linear = LinearExperts(
            Expert(names, gate_up, down, experts.get_submodule("act_fn"))
            for gate_up, down in zip(tensors[GATE_UP].detach(), tensors[DOWN].detach(), strict=True)
        )
        model.set_submodule(name, linear.train(experts.training))


def _linear(weight: Tensor) -> nn.Linear:
    # on the meta device first: the weight that comes with a new linear would be thrown away
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
