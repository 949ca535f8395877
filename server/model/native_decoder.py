"""The decoder as one program of native operations a step: what `Decoder` computes, without Python between its parts.

Legend: T = tokens of the step, S = tokens whose logits are wanted, H = heads, D = head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import GroupCodes, PackedWeight, pack
from kernels.native_cpu import AttentionInputs, NativeCpu, NativeLinear
from kernels.native_program import Buffer, HeadShape, Norm, Program, ProgramBuilder
from kernels.paged_batch import AttentionBatch, PagedLayer
from kernels.tile_layout import activation_block, repack_tiles
from server.model.decoder import finish_logits
from server.model.rotary import Rotary

# the output head is most of a small model: with 8 bits, and a scale for so many columns, its logits are off by less
# than bf16 activations make them (python -m benchmarks.cpu_quality)
_HEAD_GROUPS = (64, 32)
_HEAD_ROWS = 4096
_HEAD_ZERO = 128
_HEAD_LARGEST = 127


@dataclass(frozen=True)
class NativeLinearSpec:
    """A TILES weight [N, K] and float32 bias [N]."""

    weight: PackedWeight
    bias: Tensor | None


@dataclass(frozen=True)
class NativeLayer:
    """One decoder layer. qkv and gate_up are joined along N, as in `Decoder`."""

    attention_norm: Norm
    qkv: NativeLinearSpec
    heads: HeadShape
    output: NativeLinearSpec
    mlp_norm: Norm
    gate_up: NativeLinearSpec
    down: NativeLinearSpec


class NativeDecoder:
    """A row's results depend, to the bit, on its own sequence alone, however the sequence was cut into steps."""

    def __init__(
        self,
        cpu: NativeCpu,
        *,
        embedding: Tensor,
        layers: Sequence[NativeLayer],
        final_norm: Norm,
        head: PackedWeight,
        rotary: Rotary,
        embedding_scale: float,
        logit_scale: float,
        logit_soft_cap: float | None,
    ) -> None:
        """embedding: [vocab, hidden] in any float dtype; head: a TILES weight [vocab, hidden].

        The rest as in `Decoder`.
        """
        self.embedding = embedding
        self._cpu = cpu
        self._rotary = rotary
        self._embedding_scale = embedding_scale
        self._logit_scale = logit_scale
        self._logit_soft_cap = logit_soft_cap
        program = _LayersProgram(embedding.shape[1])
        for layer in layers:
            program.add(layer)
        self._hidden, self._normalized = program.hidden, program.normalized
        self._program: Program = program.finish(final_norm)
        self._head = NativeLinear(cpu, head)

    def forward(
        self, token_ids: Tensor, positions: Tensor, batch: AttentionBatch, kv_layers: Sequence[PagedLayer]
    ) -> Tensor:
        """As `Decoder.forward`; the caches are those of `kernels.native_cpu.allocate_native_layer`."""
        hidden = torch.nn.functional.embedding(token_ids, self.embedding).float()
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        cosines, sines = self._rotary.angles_at(positions)
        normalized = torch.empty_like(hidden)
        attention = AttentionInputs(batch, kv_layers, cosines, sines)
        given = {self._hidden: hidden, self._normalized: normalized}
        self._cpu.run(self._program, len(token_ids), given, attention)
        return normalized

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """float32 [S, vocab] of hidden states [S, hidden]."""
        return finish_logits(self._head(hidden), self._logit_scale, self._logit_soft_cap)


def round_head(weight: Tensor) -> PackedWeight:
    """A dense output head [vocab, hidden] in 8 bits, as a TILES weight. hidden must be a multiple of 32."""
    group = next(size for size in _HEAD_GROUPS if weight.shape[1] % size == 0)
    # in parts, as a large vocabulary in float32 would take gigabytes
    codes, scales = zip(*(_round_rows(rows.float(), group) for rows in torch.split(weight, _HEAD_ROWS)), strict=True)
    all_scales = torch.cat(scales)
    zeros = torch.full_like(all_scales, _HEAD_ZERO, dtype=torch.uint8)
    return repack_tiles(pack(GroupCodes(torch.cat(codes), all_scales, zeros, 8, group)))


def _round_rows(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [R, K] and float32 scales [R, K / group] of float32 rows."""
    groups = rows.view(len(rows), -1, group)
    scales = (groups.abs().amax(dim=-1) / _HEAD_LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (groups / scales[..., None]).round_().add_(_HEAD_ZERO).to(torch.uint8)
    return codes.flatten(1), scales


class _LayersProgram:
    """Builds the program; layers of one shape share their buffers."""

    def __init__(self, width: int) -> None:
        self._builder = ProgramBuilder()
        self._width = width
        self._num_layers = 0
        self._floats: dict[tuple[str, int], Buffer] = {}
        self._rounded: dict[tuple[int, int], Buffer] = {}
        self.hidden, self.normalized = self._builder.floats(width), self._builder.floats(width)

    def add(self, layer: NativeLayer) -> None:
        qkv = self._floats_for("qkv", layer.qkv.weight.shape[0])
        num_attended, num_gated = layer.output.weight.shape[1], layer.down.weight.shape[1]
        attended = self._floats_for("attended", num_attended)
        self._add_linear(self.hidden, self._width, layer.attention_norm, layer.qkv, qkv)
        self._builder.attend(qkv, attended, layer.heads, self._num_layers)
        self._add_linear(attended, num_attended, None, layer.output, self.hidden, adds=True)
        gate_up = self._floats_for("gate and up", layer.gate_up.weight.shape[0])
        self._add_linear(self.hidden, self._width, layer.mlp_norm, layer.gate_up, gate_up)
        block = activation_block(layer.down.weight.group_size)
        gated = self._rounded_for(num_gated, block)
        self._builder.gate(gate_up, gated, num_gated, block)
        self._builder.linear(gated, self.hidden, layer.down.weight, layer.down.bias, adds=True)
        self._num_layers += 1

    def finish(self, final_norm: Norm) -> Program:
        self._builder.norm(self.hidden, self.normalized, final_norm)
        return self._builder.finish()

    def _add_linear(
        self,
        source: Buffer,
        num_columns: int,
        norm: Norm | None,
        linear: NativeLinearSpec,
        target: Buffer,
        *,
        adds: bool = False,
    ) -> None:
        block = activation_block(linear.weight.group_size)
        rounded = self._rounded_for(num_columns, block)
        self._builder.quantize(source, rounded, num_columns, block, norm)
        self._builder.linear(rounded, target, linear.weight, linear.bias, adds=adds)

    def _floats_for(self, role: str, num_columns: int) -> Buffer:
        key = (role, num_columns)
        if key not in self._floats:
            self._floats[key] = self._builder.floats(num_columns)
        return self._floats[key]

    def _rounded_for(self, num_columns: int, block: int) -> Buffer:
        key = (num_columns, block)
        if key not in self._rounded:
            self._rounded[key] = self._builder.rounded(num_columns, block)
        return self._rounded[key]
