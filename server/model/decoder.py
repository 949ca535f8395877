"""The decoder of all architectures: a plain forward over paged caches. Loads nothing, schedules nothing.

Legend: T = tokens of the step, S = tokens whose logits are wanted, H = heads, D = head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import AttentionPlan
from kernels.lora import AdapterRows, LoraStack
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.rotary import HeadNorms, Rotation
from server.model.layers import Linear, Norm, ProjectionNorms, apply_adapted
from server.model.moe import Moe
from server.model.rotary import Rotary


@dataclass(frozen=True)
class Attention:
    """qkv gives the query heads, then the key heads, then the value heads. rotary: which of the decoder's turns them.

    head_norms: what normalizes each query and key by itself before it turns, where something does; projection_norms:
    where it takes all heads together. The adapters: what is added to what qkv and output give.
    """

    qkv: Linear
    output: Linear
    head_norms: HeadNorms | None
    head_dim: int
    rotary: int
    softmax_scale: float
    soft_cap: float | None
    sliding_window: int | None
    projection_norms: ProjectionNorms | None = None
    qkv_adapters: LoraStack | None = None
    output_adapters: LoraStack | None = None

    def __call__(
        self, x: Tensor, rotation: Rotation, plan: AttentionPlan, kv_layer: PagedLayer, rows: AdapterRows | None
    ) -> Tensor:
        joined = apply_adapted(self.qkv, x, self.qkv_adapters, rows)
        if self.projection_norms is not None:
            joined = self.projection_norms(joined)
        heads = joined.view(len(x), -1, self.head_dim)
        queries = dispatch.rotate_and_write(heads, rotation, self.head_norms, kv_layer, plan)
        attended = dispatch.attention(
            queries,
            kv_layer,
            plan,
            softmax_scale=self.softmax_scale,
            sliding_window=self.sliding_window,
            soft_cap=self.soft_cap,
        )
        return apply_adapted(self.output, attended.flatten(1), self.output_adapters, rows)


@dataclass(frozen=True)
class Mlp:
    """gate_up gives the gate's outputs, then the up projection's, as gate takes them: [T, 2K] to [T, K].

    The adapters: what is added to what gate_up and down give.
    """

    gate_up: Linear
    gate: Callable[[Tensor], Tensor]
    down: Linear
    gate_up_adapters: LoraStack | None = None
    down_adapters: LoraStack | None = None

    def __call__(self, x: Tensor, rows: AdapterRows | None) -> Tensor:
        gated = self.gate(apply_adapted(self.gate_up, x, self.gate_up_adapters, rows))
        return apply_adapted(self.down, gated, self.down_adapters, rows)


@dataclass(frozen=True)
class DecoderLayer:
    """The output norms are of what attention and MLP give. mlp_norm None: the MLP reads what attention reads."""

    attention_norm: Norm
    attention: Attention
    attention_output_norm: Norm
    mlp_norm: Norm | None
    mlp: Mlp | Moe
    mlp_output_norm: Norm

    def __call__(
        self,
        normed: Tensor,
        hidden: Tensor,
        norm_after: Norm,
        rotation: Rotation,
        plan: AttentionPlan,
        kv_layer: PagedLayer,
        rows: AdapterRows | None,
    ) -> tuple[Tensor, Tensor]:
        """hidden [T, hidden], and normed, which is hidden after this layer's first norm, to those of the next layer."""
        attended = self.attention_output_norm(self.attention(normed, rotation, plan, kv_layer, rows))
        if self.mlp_norm is None:
            return norm_after.after_adding(attended + self.mlp_output_norm(self.mlp(normed, rows)), hidden)
        normed, hidden = self.mlp_norm.after_adding(attended, hidden)
        return norm_after.after_adding(self.mlp_output_norm(self.mlp(normed, rows)), hidden)


@dataclass(frozen=True)
class Decoder:
    """embedding [vocab, hidden]; head [vocab, hidden] is the same tensor where they are tied.

    rotaries: the different ones of the layers. embedding_scale, logit_scale: what embeddings and logits are multiplied
    by. logit_soft_cap: logits then become cap * tanh(logit / cap).
    """

    embedding: Tensor
    layers: tuple[DecoderLayer, ...]
    final_norm: Norm
    head: Linear
    rotaries: tuple[Rotary, ...]
    embedding_scale: float
    logit_scale: float
    logit_soft_cap: float | None

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        kv_layers: Sequence[PagedLayer],
        rows: AdapterRows | None = None,
    ) -> Tensor:
        """Run the step's tokens int64 [T] at positions int64 [T]; write their keys and values into the caches.

        rows: which tokens go through which adapter, None where none does.
        Returns the normalized hidden states [T, hidden] in the model's dtype.
        """
        hidden = dispatch.gather_rows(token_ids, self.embedding)
        if self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        rotations = [rotary.at(positions, hidden.dtype) for rotary in self.rotaries]
        windows = {layer.attention.sliding_window for layer in self.layers}
        plan = dispatch.plan_attention(batch, kv_layers[0], windows)
        normed = self.layers[0].attention_norm(hidden)
        # a norm runs together with the sum before it: each layer is told the norm that follows
        norms_after = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]
        for layer, norm_after, kv_layer in zip(self.layers, norms_after, kv_layers, strict=True):
            rotation = rotations[layer.attention.rotary]
            normed, hidden = layer(normed, hidden, norm_after, rotation, plan, kv_layer, rows)
        return normed

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden]."""
        return finish_logits(self.head(hidden).float(), self.logit_scale, self.logit_soft_cap)


def finish_logits(logits: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    """What an output head gives, multiplied and capped, in float32."""
    if scale != 1.0:
        logits = logits * scale
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
