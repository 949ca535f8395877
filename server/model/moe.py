"""A mixture of experts in the place of an MLP. Waits for the device nowhere, so that a captured graph replays it.

Legend: T = tokens of the step, K = hidden size, E = experts, I = an expert's inner width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import ExpertWeights
from kernels.lora import AdapterRows


class AdaptedMlp(Protocol):
    """x [T, K] to [T, K], with what adapters add for the rows that have one."""

    def __call__(self, x: Tensor, rows: AdapterRows | None) -> Tensor: ...


@dataclass(frozen=True)
class SharedExpert:
    """The expert of all tokens. Its share is the sigmoid of the router's last output."""

    mlp: AdaptedMlp

    def __call__(self, x: Tensor, gate_logits: Tensor, rows: AdapterRows | None) -> Tensor:
        """x [T, K], gate_logits [T, 1]."""
        return torch.sigmoid(gate_logits) * self.mlp(x, rows)


@dataclass(frozen=True)
class Moe:
    """router [E, K], with a row more for the gate of a shared expert. gate_up and down: [2I, K] and [K, I] an expert.

    norm_topk_prob: the weights of a token's num_experts_per_tok choices are made to add up to 1.
    """

    router: Tensor
    gate_up: ExpertWeights
    down: ExpertWeights
    shared_expert: SharedExpert | None
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool

    def __call__(self, x: Tensor, rows: AdapterRows | None = None) -> Tensor:
        """rows: for the shared expert; the others take no adapters."""
        logits = dispatch.router_logits(x, self.router)
        routing = dispatch.route(
            logits[:, : self.num_experts], self.num_experts_per_tok, renormalized=self.norm_topk_prob
        )
        plan = dispatch.plan_experts(routing.experts, self.num_experts)
        gated = dispatch.silu_gate(dispatch.grouped_linear(x, self.gate_up, plan))
        output = dispatch.sum_choices(dispatch.grouped_linear(gated, self.down, plan), routing.weights)
        if self.shared_expert is None:
            return output
        return output + self.shared_expert(x, logits[:, self.num_experts :], rows)
