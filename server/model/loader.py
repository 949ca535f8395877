"""From a checkpoint directory to a decoder on a device. Strict: nothing missing, nothing left over, nothing guessed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kernels import dispatch
from kernels.dispatch import ExpertWeights
from kernels.layout import concatenate_rows
from kernels.lora import LoraStack
from kernels.native_cpu import NativeCpu
from kernels.reference import dequantize
from kernels.rotary import HeadNorms
from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from server.model.adapter import Adapter
from server.model.adapter_stacks import AdapterStacks
from server.model.architectures import Activation, HeadNorm, NormKind
from server.model.config import ModelConfig, read_model_config
from server.model.decoder import Attention, Decoder, DecoderLayer, Mlp
from server.model.expected_tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    MoeSpec,
    NormSpec,
    check_tensors,
    layer_spec,
)
from server.model.layers import (
    DenseLinear,
    JoinedLinear,
    LayerNorm,
    Linear,
    NoNorm,
    Norm,
    ProjectionNorms,
    QuantizedLinear,
    RmsNorm,
)
from server.model.moe import Moe, SharedExpert
from server.model.native_decoder import NativeDecoder
from server.model.native_loader import load_native_decoder
from server.model.rotary import build_rotary
from server.model.rotation_order import TurnedWeights, row_orders
from server.model.weight_source import WeightSource

_GATES = {Activation.SILU: dispatch.silu_gate, Activation.GELU_TANH: dispatch.gelu_gate}


@dataclass(frozen=True)
class LoadProgress:
    """How far an engine is that starts: of num_all things to do so many are done, each an activity's."""

    num_done: int
    num_all: int
    activity: str = "loading layer"

    @property
    def detail(self) -> str:
        """For people."""
        return f"{self.activity} {self.num_done} of {self.num_all}"


def ignore_load_progress(_progress: LoadProgress) -> None:
    """A listener for callers that do not look."""


@dataclass(frozen=True)
class LoadedModel:
    """config.dtype is the dtype that the decoder computes in; adapters: those that it has, by their numbers."""

    decoder: Decoder | NativeDecoder
    config: ModelConfig
    adapters: tuple[Adapter, ...] = ()

    @property
    def is_native(self) -> bool:
        """Whether its caches are those of `kernels.native_cpu.allocate_native_layer`."""
        return isinstance(self.decoder, NativeDecoder)


def load_model(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    report: Callable[[LoadProgress], None],
    native: NativeCpu | None = None,
    max_model_len: int | None = None,
    adapters: Sequence[Adapter] = (),
) -> LoadedModel:
    """Load a checkpoint, quantized or not. dtype None means float32 on a CPU, the checkpoint's own on a GPU.

    native: what computes it in float32 on a CPU, for a model to which `find_native_obstacle` finds none.
    max_model_len: the longest sequence it is to compute, None for the config's max_position_embeddings; a model whose
    rotation is another for long sequences takes that one for all where some may be long. adapters: of the model, not
    for native operations, which know none.

    Raises CheckpointError, before anything is loaded, when the directory is no checkpoint of a known architecture or
    a tensor is missing, left over, or of the wrong shape or dtype; ValueError for a device without kernels.
    """
    dispatch.runtime_layout(device)
    reader = CheckpointReader.open(directory)
    config = read_model_config(directory)
    check_tensors(reader, config)
    config = replace(config, max_position_embeddings=max_model_len or config.max_position_embeddings)
    if native is not None:
        native_decoder = load_native_decoder(
            reader, config, native, lambda num_loaded: report(LoadProgress(num_loaded, config.num_layers))
        )
        return LoadedModel(native_decoder, replace(config, dtype=torch.float32))
    return build_model(reader, config, device, dtype or _default_dtype(reader, config, device), report, adapters)


def build_model(
    weights: WeightSource,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[LoadProgress], None],
    adapters: Sequence[Adapter] = (),
) -> LoadedModel:
    """A model of the config on the device, from weights that have all that it needs in the right shapes."""
    if config.architecture.turns_neighbours:
        weights = TurnedWeights(weights, config)
    source = _Source(weights, device, dtype, AdapterStacks(tuple(adapters), row_orders(config)))
    # layers that turn alike share the angles of a step
    ropes = list(dict.fromkeys(config.layer_ropes))
    max_len = config.max_position_embeddings
    embedding = source.read_dense(EMBEDDING)
    layers = []
    for index in range(config.num_layers):
        layers.append(_build_layer(source, config, index, ropes.index(config.layer_ropes[index])))
        report(LoadProgress(index + 1, config.num_layers))
    decoder = Decoder(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=source.read_norm(FINAL_NORM, config.architecture.norm, config.stream_norm_epsilon),
        head=_build_head(source, config, embedding),
        rotaries=tuple(build_rotary(rope, config.head_dim, max_len, device) for rope in ropes),
        embedding_scale=_embedding_scale(config, dtype),
        logit_scale=config.logit_scale,
        logit_soft_cap=config.logit_soft_cap,
    )
    return LoadedModel(decoder, replace(config, dtype=source.dtype), tuple(adapters))


@dataclass(frozen=True)
class _Source:
    """The checkpoint's tensors, as the device's kernels want them."""

    reader: WeightSource
    device: torch.device
    dtype: torch.dtype
    adapters: AdapterStacks

    def read_adapters(self, specs: Sequence[LinearSpec]) -> LoraStack | None:
        """What is added to what `read_linear` of the same modules gives."""
        return self.adapters.read(specs, self.device, self.dtype)

    def read_dense(self, name: str) -> Tensor:
        return self.reader.read_tensor(name).to(device=self.device, dtype=self.dtype)

    def read_norm(self, name: str, kind: NormKind, epsilon: float) -> RmsNorm | LayerNorm:
        if kind is NormKind.LAYER:
            return LayerNorm(self.read_dense(name), epsilon)
        if kind is NormKind.RMS:
            return RmsNorm(self.read_dense(name), epsilon)
        # the sum has digits that the activations' dtype lacks
        return RmsNorm(1.0 + self.reader.read_tensor(name).to(device=self.device, dtype=torch.float32), epsilon)

    def read_linear(self, specs: Sequence[LinearSpec]) -> Linear:
        """One layer for modules that share their input: joined along N where all are dense, or quantized alike.

        A weight that no kernel reads packed is dequantized into a dense one.
        """
        quantized = [self.reader.is_quantized(spec.name) for spec in specs]
        biases = [self.read_dense(f"{spec.name}.bias") for spec in specs if spec.bias]
        bias = torch.cat(biases) if biases else None
        if not any(quantized):
            return DenseLinear(torch.cat([self.read_dense(f"{spec.name}.weight") for spec in specs]), bias)
        if not all(quantized) or not self._are_packed_alike(specs):
            return JoinedLinear(tuple(self.read_linear([spec]) for spec in specs))
        weight = concatenate_rows([self.reader.read_packed(spec.name) for spec in specs])
        if not dispatch.has_packed_kernel(weight, self.device):
            return DenseLinear(dequantize(weight).to(device=self.device, dtype=self.dtype), bias)
        try:
            return QuantizedLinear(dispatch.prepare_weight(weight, self.device), bias)
        except ValueError as error:
            raise CheckpointError(f"{specs[0].name}: {error}") from error

    def read_weight(self, spec: LinearSpec) -> Tensor:
        """The weight [N, K] in the dtype of the activations, dequantized if need be."""
        if not self.reader.is_quantized(spec.name):
            return self.read_dense(f"{spec.name}.weight")
        return dequantize(self.reader.read_packed(spec.name)).to(device=self.device, dtype=self.dtype)

    def read_experts(self, experts: Sequence[Sequence[LinearSpec]]) -> ExpertWeights:
        """One weight an expert, joined along N of modules that share their input.

        Packed where all are quantized alike and a kernel reads them so, else dense.
        """
        specs = [spec for modules in experts for spec in modules]
        if all(self.reader.is_quantized(spec.name) for spec in specs) and self._are_packed_alike(specs):
            weights = [
                concatenate_rows([self.reader.read_packed(spec.name) for spec in modules]) for modules in experts
            ]
            if dispatch.has_packed_kernel(weights[0], self.device):
                try:
                    return dispatch.prepare_experts(weights, self.device)
                except ValueError as error:
                    raise CheckpointError(f"{specs[0].name}: {error}") from error
        return torch.stack([torch.cat([self.read_weight(spec) for spec in modules]) for modules in experts])

    def _are_packed_alike(self, specs: Sequence[LinearSpec]) -> bool:
        packed = [self.reader.packed_spec(spec.name) for spec in specs]
        return len({(spec.bits, spec.group_size, spec.scale_dtype) for spec in packed}) == 1


def _build_layer(source: _Source, config: ModelConfig, index: int, rotary: int) -> DecoderLayer:
    spec, row = layer_spec(config, index), config.architecture

    def norm(norm_spec: NormSpec | None, epsilon: float) -> Norm:
        return NoNorm() if norm_spec is None else source.read_norm(norm_spec.name, row.norm, epsilon)

    return DecoderLayer(
        attention_norm=norm(spec.attention_norm, config.stream_norm_epsilon),
        attention=_build_attention(source, config, spec, rotary, config.layer_windows[index]),
        attention_output_norm=norm(spec.attention_output_norm, config.norm_epsilon),
        mlp_norm=None if row.is_parallel else norm(spec.mlp_norm, config.stream_norm_epsilon),
        mlp=_build_moe(source, config, spec.mlp)
        if isinstance(spec.mlp, MoeSpec)
        else _build_mlp(source, config, spec.mlp),
        mlp_output_norm=norm(spec.mlp_output_norm, config.norm_epsilon),
    )


def _build_attention(
    source: _Source, config: ModelConfig, spec: LayerSpec, rotary: int, sliding_window: int | None
) -> Attention:
    head_norms, projection_norms = None, None
    if spec.query_norm is not None and spec.key_norm is not None:
        query_norm, key_norm = (
            source.read_norm(norm.name, config.architecture.norm, config.norm_epsilon)
            for norm in (spec.query_norm, spec.key_norm)
        )
        if config.head_norm is HeadNorm.EVERY_HEAD:
            head_norms = HeadNorms(query_norm.weight, key_norm.weight, config.norm_epsilon)
        else:
            projection_norms = ProjectionNorms(query_norm, key_norm)
    return Attention(
        qkv=source.read_linear(spec.qkv),
        output=source.read_linear((spec.output,)),
        head_norms=head_norms,
        head_dim=config.head_dim,
        rotary=rotary,
        softmax_scale=config.softmax_scale,
        soft_cap=config.attention_soft_cap,
        sliding_window=sliding_window,
        projection_norms=projection_norms,
        qkv_adapters=source.read_adapters(spec.qkv),
        output_adapters=source.read_adapters((spec.output,)),
    )


def _build_mlp(source: _Source, config: ModelConfig, spec: MlpSpec) -> Mlp:
    return Mlp(
        gate_up=source.read_linear(spec.gate_up),
        gate=_GATES[config.activation],
        down=source.read_linear((spec.down,)),
        gate_up_adapters=source.read_adapters(spec.gate_up),
        down_adapters=source.read_adapters((spec.down,)),
    )


def _build_moe(source: _Source, config: ModelConfig, spec: MoeSpec) -> Moe:
    shared = spec.shared_expert
    gates = [spec.router, *([shared.gate] if shared else [])]
    return Moe(
        router=torch.cat([source.read_weight(gate) for gate in gates]),
        gate_up=source.read_experts([expert.gate_up for expert in spec.experts]),
        down=source.read_experts([(expert.down,) for expert in spec.experts]),
        shared_expert=SharedExpert(_build_mlp(source, config, shared.mlp)) if shared else None,
        num_experts=len(spec.experts),
        num_experts_per_tok=spec.num_experts_per_tok,
        norm_topk_prob=spec.norm_topk_prob,
    )


def _embedding_scale(config: ModelConfig, dtype: torch.dtype) -> float:
    scale = config.stream_embedding_scale
    return float(torch.tensor(scale, dtype=dtype)) if config.architecture.rounds_embedding_scale else scale


def _build_head(source: _Source, config: ModelConfig, embedding: Tensor) -> Linear:
    """The output head. A tied model may ship one all the same: a dense one that differs wins, a packed one is a copy
    of the embedding with less precision and is left."""
    tied = DenseLinear(embedding, None)
    if not config.tie_word_embeddings:
        return source.read_linear((LinearSpec(HEAD, config.vocab_size, config.hidden_size, bias=False),))
    if f"{HEAD}.weight" not in source.reader.tensor_names:
        return tied
    weight = source.read_dense(f"{HEAD}.weight")
    return tied if torch.equal(weight, embedding) else DenseLinear(weight, None)


def _default_dtype(reader: CheckpointReader, config: ModelConfig, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return config.dtype or reader.dtype(EMBEDDING)
