"""Experts as linears of their own, where transformers holds all of a block's in two tensors; the function stays.

A checkpoint holds each expert's three matrices under names of their own, and quantization works on linears.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from quant.model_structure import stored_tensors

# what transformers calls the tensors of its experts modules: [E, 2 I, H] with the gates above, and [E, H, I]
GATE_UP, DOWN = "gate_up_proj", "down_proj"
# magnitudes of the states that experts are compared on: some families' activations are cut off where they are large
PROBE_MAGNITUDES = (1.0, 100.0)


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the three linears of an expert: down(act(gate(x)) * up(x))."""

    gate: str
    up: str
    down: str


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

    def inputs(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """What each linear reads when the expert reads hidden_states [tokens, H], by the linear's name."""
        return {
            self._names.gate: hidden_states,
            self._names.up: hidden_states,
            self._names.down: self._activations(hidden_states),
        }

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[tokens, H] to [tokens, H]."""
        output: Tensor = self.get_submodule(self._names.down)(self._activations(hidden_states))
        return output

    def _activations(self, hidden_states: Tensor) -> Tensor:
        gated: Tensor = self.act_fn(self.get_submodule(self._names.gate)(hidden_states))
        return torch.mul(gated, self.get_submodule(self._names.up)(hidden_states))


class LinearExperts(nn.ModuleList):
    """All experts of a block, called as transformers calls its own experts module."""

    def named_experts(self) -> dict[str, Expert]:
        """The experts by their numbers."""
        return {number: expert for number, expert in self.named_children() if isinstance(expert, Expert)}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts; hidden_states [tokens, H], the other two [tokens, k]."""
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, choices = torch.where(top_k_index == number)
            if len(tokens):
                weighted = expert(hidden_states[tokens]) * top_k_weights[tokens, choices, None]
                output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def linearize_experts(model: PreTrainedModel) -> None:
    """Replace the model's experts modules in place; the new weights share the old ones' memory, if they have any.

    A module stays as it is where the model's checkpoints hold no matrix per expert, or where its experts compute
    something else (have biases, clamp their activations).
    """
    for name, experts in [(name, module) for name, module in model.named_modules() if hasattr(module, GATE_UP)]:
        tensors = dict(experts.named_parameters(recurse=False))
        if tensors.keys() != {GATE_UP, DOWN} or not isinstance(getattr(experts, "act_fn", None), nn.Module):
            continue
        names = _stored_names(model, name, len(tensors[DOWN]))
        if names is None:
            continue
        if _compute_the_same(experts, names):
            model.set_submodule(name, _linearized(experts, names))


def _linearized(experts: nn.Module, names: ExpertNames) -> LinearExperts:
    gate_ups, downs = (experts.get_parameter(name).detach() for name in (GATE_UP, DOWN))
    return LinearExperts(
        Expert(names, gate_up, down, experts.get_submodule("act_fn"))
        for gate_up, down in zip(gate_ups, downs, strict=True)
    ).train(experts.training)


def _stored_names(model: PreTrainedModel, module_name: str, num_experts: int) -> ExpertNames | None:
    """What checkpoints call an expert's linears, from where they put a gate of 0, an up of 1 and a down of 2."""
    gate_up = torch.tensor([0, 1]).expand(num_experts, 2)[..., None]
    down = torch.tensor([2]).expand(num_experts, 1)[..., None]
    stored = stored_tensors(model, {f"{module_name}.{GATE_UP}": gate_up, f"{module_name}.{DOWN}": down})
    if len(stored) != 3 * num_experts or any(tensor.numel() != 1 for tensor in stored.values()):
        return None
    leaves = {int(tensor): name.removesuffix(".weight").rpartition(".")[2] for name, tensor in stored.items()}
    return ExpertNames(gate=leaves[0], up=leaves[1], down=leaves[2]) if leaves.keys() == {0, 1, 2} else None


@torch.no_grad()
def _compute_the_same(experts: nn.Module, names: ExpertNames) -> bool:
    """Whether the first and the last expert give the same for random weights and states, small ones and large ones.

    The weights are of one expert, as if all were alike: the module's own may not be in memory.
    """
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(experts)
    for name in (GATE_UP, DOWN):
        shape = experts.get_parameter(name).shape
        weight = torch.randn(1, *shape[1:], generator=generator) * shape[-1] ** -0.5
        probe.register_parameter(name, nn.Parameter(weight.expand(shape)))
    linear = _linearized(probe, names)
    num_experts, width, _ = experts.get_parameter(DOWN).shape
    chosen = torch.tensor([[0], [num_experts - 1]])
    weights = torch.tensor([[1.0], [0.5]])
    for magnitude in PROBE_MAGNITUDES:
        states = magnitude * torch.randn(2, width, generator=generator)
        expected, output = (module(states, chosen, weights) for module in (probe, linear))
        if not torch.allclose(output, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().amax())):
            return False
    return True


def _linear(weight: Tensor) -> nn.Linear:
    # on the meta device first: the weight that comes with a new linear would be thrown away
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
