"""From a checkpoint to a decoder of native operations, and the reasons why one cannot be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.layout import PackedWeight, concatenate_rows
from kernels.native_cpu import NativeCpu
from kernels.native_program import KEYS_PER_VECTOR, HeadShape, Norm
from kernels.tile_layout import activation_block, repack_tiles
from quant.checkpoint.reader import CheckpointReader
from server.model.architectures import Activation, HeadNorm, LayerNorms, NormKind
from server.model.config import ModelConfig, read_model_config
from server.model.expected_tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LinearSpec,
    check_tensors,
    head_spec,
    layer_spec,
)
from server.model.native_decoder import NativeDecoder, NativeLayer, NativeLinearSpec, round_head
from server.model.rotary import build_rotary

DTYPE = torch.float32


def find_native_obstacle(directory: Path) -> str | None:
    """Why the native operations cannot compute the model of a checkpoint directory; None when they can.

    Raises CheckpointError as `load_model` does.
    """
    reader = CheckpointReader.open(directory)
    config = read_model_config(directory)
    check_tensors(reader, config)
    if obstacle := _find_obstacle_of_architecture(config):
        return obstacle
    if config.head_dim % KEYS_PER_VECTOR:
        return f"its heads are {config.head_dim} wide, no multiple of {KEYS_PER_VECTOR}"
    if config.hidden_size % 32:
        return f"its hidden size {config.hidden_size} is no multiple of 32"
    groups = [specs for index in range(config.num_layers) for specs in layer_spec(config, index).joined]
    if _has_packed_head(reader, config):
        groups.append((head_spec(config),))
    return next(filter(None, (_find_obstacle_of(reader, specs) for specs in groups)), None)


def _find_obstacle_of_architecture(config: ModelConfig) -> str | None:
    row, ropes = config.architecture, set(config.layer_ropes)
    obstacles = (
        (config.moe is not None, "its layers are mixtures of experts"),
        (row.norm is not NormKind.RMS, "its norms are of another kind"),
        (row.layer_norms != LayerNorms() or row.is_parallel, "its norms are at other places"),
        (config.head_norm not in (HeadNorm.NEVER, HeadNorm.EVERY_HEAD), "its head norms are of another kind"),
        (config.activation is not Activation.SILU, f"its activation is {config.activation.value}, not silu"),
        (config.attention_soft_cap is not None, "its attention has a soft cap"),
        (len(ropes) > 1 or None in ropes, "its layers do not all turn alike"),
        (row.turns_neighbours, "its heads turn in pairs of neighbours"),
        (any(rope and rope.rotary_dim < config.head_dim for rope in ropes), "only a part of its heads turns"),
    )
    return next((sentence for applies, sentence in obstacles if applies), None)


def load_native_decoder(
    reader: CheckpointReader, config: ModelConfig, cpu: NativeCpu, report: Callable[[int], None]
) -> NativeDecoder:
    """Load a checkpoint that has no obstacle. report: called with the number of layers loaded."""
    source = _Source(reader, config)
    embedding = reader.read_tensor(EMBEDDING)
    layers = []
    for index in range(config.num_layers):
        layers.append(_read_layer(source, index))
        report(index + 1)
    return NativeDecoder(
        cpu,
        embedding=embedding,
        layers=layers,
        final_norm=source.read_norm(FINAL_NORM, config.stream_norm_epsilon),
        head=_read_head(source, embedding),
        rotary=build_rotary(
            config.layer_ropes[0], config.head_dim, config.max_position_embeddings, torch.device("cpu")
        ),
        embedding_scale=config.stream_embedding_scale,
        logit_scale=config.logit_scale,
        logit_soft_cap=config.logit_soft_cap,
    )


@dataclass(frozen=True)
class _Source:
    reader: CheckpointReader
    config: ModelConfig

    def read_dense(self, name: str) -> Tensor:
        return self.reader.read_tensor(name).to(DTYPE)

    def read_norm(self, name: str, epsilon: float) -> Norm:
        return Norm(self.read_dense(name), epsilon)

    def read_linear(self, specs: Sequence[LinearSpec]) -> NativeLinearSpec:
        biases = [self.read_dense(f"{spec.name}.bias") for spec in specs if spec.bias]
        weight = concatenate_rows([self.reader.read_packed(spec.name) for spec in specs])
        return NativeLinearSpec(repack_tiles(weight), torch.cat(biases) if biases else None)


def _find_obstacle_of(reader: CheckpointReader, specs: Sequence[LinearSpec]) -> str | None:
    if dense := [spec.name for spec in specs if not reader.is_quantized(spec.name)]:
        return f"{dense[0]} is not quantized"
    packed = [reader.packed_spec(spec.name) for spec in specs]
    if len({(spec.bits, spec.group_size, spec.scale_dtype) for spec in packed}) > 1:
        return f"{' and '.join(spec.name for spec in specs)} are quantized in different ways"
    try:
        activation_block(packed[0].group_size)
    except ValueError as error:
        return f"{specs[0].name}: {error}"
    return None


def _read_layer(source: _Source, index: int) -> NativeLayer:
    config = source.config
    spec = layer_spec(config, index)
    # an architecture without them is an obstacle
    assert spec.attention_norm is not None
    assert spec.mlp_norm is not None
    attention_norm, mlp_norm = (
        source.read_norm(norm.name, config.stream_norm_epsilon) for norm in (spec.attention_norm, spec.mlp_norm)
    )
    query_norm, key_norm = (
        None if norm is None else source.read_norm(norm.name, config.norm_epsilon)
        for norm in (spec.query_norm, spec.key_norm)
    )
    qkv, output, gate_up, down = (source.read_linear(specs) for specs in spec.joined)
    heads = HeadShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        softmax_scale=config.softmax_scale,
        window=config.layer_windows[index],
        query_norm=query_norm,
        key_norm=key_norm,
    )
    return NativeLayer(attention_norm, qkv, heads, output, mlp_norm, gate_up, down)


def _has_packed_head(reader: CheckpointReader, config: ModelConfig) -> bool:
    """A tied model's packed head is a copy of the embedding with less precision, and is left."""
    return not config.tie_word_embeddings and reader.is_quantized(HEAD)


def _read_head(source: _Source, embedding: Tensor) -> PackedWeight:
    """A dense head that a tied model ships all the same wins, as in `load_model`."""
    if _has_packed_head(source.reader, source.config):
        return repack_tiles(source.reader.read_packed(HEAD))
    name = f"{HEAD}.weight"
    return round_head(source.reader.read_tensor(name) if name in source.reader.tensor_names else embedding)
