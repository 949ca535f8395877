"""The decoder of the Llama family: a plain forward over paged caches. Loads nothing, schedules nothing.

Legend: T = tokens of the step, S = tokens whose logits are wanted, H = heads, D = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kernels import dispatch
from kernels.dispatch import AttentionPlan
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.rotary import HeadNorms, Rotation
from server.model.layers import Linear, RmsNorm, rotation_at
from server.model.moe import Moe


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
        queries = dispatch.rotate_and_write(heads, rotation, self._head_norms, kv_layer, plan)
        attended = dispatch.attention(
            queries, kv_layer, plan, softmax_scale=self.head_dim**-0.5, sliding_window=self.sliding_window
        )
        return self.output(attended.flatten(1))

    @property
    def _head_norms(self) -> HeadNorms | None:
        if self.query_norm is None or self.key_norm is None:
            return None
        return HeadNorms(self.query_norm.weight, self.key_norm.weight, self.query_norm.epsilon)


@dataclass(frozen=True)
class Mlp:
    """gate_up gives the gate's outputs, then the up projection's."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(dispatch.silu_gate(self.gate_up(x)))


@dataclass(frozen=True)
class DecoderLayer:
    attention_norm: RmsNorm
    attention: Attention
    mlp_norm: RmsNorm
    mlp: Mlp | Moe

    def __call__(
        self,
        normed: Tensor,
        hidden: Tensor,
        norm_after: RmsNorm,
        rotation: Rotation,
        plan: AttentionPlan,
        kv_layer: PagedLayer,
    ) -> tuple[Tensor, Tensor]:
        """hidden [T, hidden], and normed, which is hidden after this layer's first norm, to those of the next layer."""
        attended = self.attention(normed, rotation, plan, kv_layer)
        normed, hidden = self.mlp_norm.after_adding(attended, hidden)
        return norm_after.after_adding(self.mlp(normed), hidden)


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
        hidden = dispatch.gather_rows(token_ids, self.embedding)
        rotation = rotation_at(positions, self.inverse_frequencies, hidden.dtype)
        windows = {layer.attention.sliding_window for layer in self.layers}
        plan = dispatch.plan_attention(batch, kv_layers[0], windows)
        normed = self.layers[0].attention_norm(hidden)
        # a norm runs together with the sum before it: each layer is told the norm that follows
        norms_after = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]
        for layer, norm_after, kv_layer in zip(self.layers, norms_after, kv_layers, strict=True):
            normed, hidden = layer(normed, hidden, norm_after, rotation, plan, kv_layer)
        return normed

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden]."""
        return self.head(hidden).float()
