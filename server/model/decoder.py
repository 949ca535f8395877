"""The decoder of the Llama family: a plain forward over paged caches. Loads nothing, schedules nothing.

Legend: T = tokens of the step, S = tokens whose logits are wanted, H = heads, D = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import AttentionPlan
from kernels.paged_batch import AttentionBatch, PagedLayer
from server.model.layers import Linear, RmsNorm, Rotation, rotation_at


@dataclass(frozen=True)
class Attention:
    """qkv gives the query heads, then the key heads, then the value heads. The norms are per head, where there are."""

    qkv: Linear
    output: Linear
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None

    def __call__(self, x: Tensor, rotation: Rotation, plan: AttentionPlan, kv_layer: PagedLayer) -> Tensor:
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        queries_and_keys, values = heads[:, :num_rotated], heads[:, num_rotated:]
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = heads[:, : self.num_heads], heads[:, self.num_heads : num_rotated]
            queries_and_keys = torch.cat((self.query_norm(queries), self.key_norm(keys)), dim=1)
        rotated = rotation(queries_and_keys)
        queries, keys = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
        dispatch.write_kv(keys, values, kv_layer, plan)
        attended = dispatch.attention(
            queries, kv_layer, plan, softmax_scale=self.head_dim**-0.5, sliding_window=self.sliding_window
        )
        return self.output(attended.flatten(1))


@dataclass(frozen=True)
class Mlp:
    """gate_up gives the gate's outputs, then the up projection's."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(torch.nn.functional.silu(gate) * up)


@dataclass(frozen=True)
class DecoderLayer:
    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: Mlp

    def __call__(self, hidden: Tensor, rotation: Rotation, plan: AttentionPlan, kv_layer: PagedLayer) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), rotation, plan, kv_layer)
        return hidden + self.mlp(self.mlp_norm(hidden))


@dataclass(frozen=True)
class Decoder:
    """embedding [vocab, hidden]; head [vocab, hidden] is the same tensor where they are tied."""

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: RmsNorm
    head: Linear
    inverse_frequencies: Tensor

    def forward(
        self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, kv_layers: Sequence[PagedLayer]
    ) -> Tensor:
        """Run the step's tokens int64 [T] at positions int64 [T]; write their keys and values into the caches.

        Returns the normalized hidden states [T, hidden] in the model's dtype.
        """
        hidden = torch.nn.functional.embedding(token_ids, self.embedding)
        rotation = rotation_at(positions, self.inverse_frequencies, hidden.dtype)
        windows = {layer.attention.sliding_window for layer in self.layers}
        plan = dispatch.plan_attention(batch, kv_layers[0], windows)
        for layer, kv_layer in zip(self.layers, kv_layers, strict=True):
            hidden = layer(hidden, rotation, plan, kv_layer)
        return self.final_norm(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden]."""
        return self.head(hidden).float()
