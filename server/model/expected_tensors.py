"""Which tensors a model of a given config has, and the check that a checkpoint has them all and no others."""

from dataclasses import dataclass

import torch

from quant.checkpoint.reader import CheckpointReader
from quant.errors import CheckpointError
from server.model.architectures import HeadNorm
from server.model.config import ModelConfig
from server.model.moe_config import MoeFamily

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head"
# computed, not learned: older transformers saved them
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_NAMES_IN_MESSAGE = 5


@dataclass(frozen=True)
class LinearSpec:
    """A linear module by its name in the checkpoint; num_outputs = N, num_inputs = K."""

    name: str
    num_outputs: int
    num_inputs: int
    bias: bool


@dataclass(frozen=True)
class MlpSpec:
    """The linears of a dense MLP, or of an expert. gate_up: gate and up, or one module that is both."""

    gate_up: tuple[LinearSpec, ...]
    down: LinearSpec

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        return (*self.gate_up, self.down)


@dataclass(frozen=True)
class SharedExpertSpec:
    """gate: of one output, what its share is computed from."""

    mlp: MlpSpec
    gate: LinearSpec

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        return (*self.mlp.linears, self.gate)


@dataclass(frozen=True)
class MoeSpec:
    """A router and its experts, in the order of the router's outputs. The numbers as in `MoeConfig`."""

    router: LinearSpec
    experts: tuple[MlpSpec, ...]
    shared_expert: SharedExpertSpec | None
    num_experts_per_tok: int
    norm_topk_prob: bool

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        of_experts = tuple(linear for expert in self.experts for linear in expert.linears)
        return (self.router, *of_experts, *(self.shared_expert.linears if self.shared_expert else ()))


@dataclass(frozen=True)
class NormSpec:
    """The weight of a norm by its name in the checkpoint."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer: its linears and norms by role; None where there is no norm.

    qkv: the projections to queries, keys and values, or one module that is all of them.
    """

    qkv: tuple[LinearSpec, ...]
    output: LinearSpec
    mlp: MlpSpec | MoeSpec
    attention_norm: NormSpec | None
    attention_output_norm: NormSpec | None
    mlp_norm: NormSpec | None
    mlp_output_norm: NormSpec | None
    query_norm: NormSpec | None
    key_norm: NormSpec | None

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        return (*self.qkv, self.output, *self.mlp.linears)

    @property
    def joined(self) -> tuple[tuple[LinearSpec, ...], ...]:
        """The linears outside of a mixture's experts and router, those together that share their input."""
        if isinstance(self.mlp, MlpSpec):
            mlp: MlpSpec | None = self.mlp
        else:
            mlp = self.mlp.shared_expert.mlp if self.mlp.shared_expert else None
        return (self.qkv, (self.output,), *((mlp.gate_up, (mlp.down,)) if mlp else ()))

    @property
    def norms(self) -> tuple[NormSpec, ...]:
        of_states = (self.attention_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm)
        return tuple(norm for norm in (*of_states, self.query_norm, self.key_norm) if norm is not None)


def layer_spec(config: ModelConfig, index: int) -> LayerSpec:
    """What layer `index` of the config is made of."""
    prefix = f"model.layers.{index}"
    attention = f"{prefix}.self_attn"
    hidden, row = config.hidden_size, config.architecture
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def norm(name: str | None) -> NormSpec | None:
        return None if name is None else NormSpec(f"{prefix}.{name}.weight", (hidden,))

    return LayerSpec(
        qkv=_joined_specs(attention, row.qkv, (queries, keys, keys), hidden, bias=config.qkv_bias),
        output=LinearSpec(f"{attention}.o_proj", hidden, queries, config.output_bias),
        mlp=_mlp_spec(config, prefix, index),
        attention_norm=norm(row.layer_norms.attention),
        attention_output_norm=norm(row.layer_norms.attention_output),
        mlp_norm=norm(row.layer_norms.mlp),
        mlp_output_norm=norm(row.layer_norms.mlp_output),
        query_norm=_head_norm_spec(config, f"{attention}.q_norm.weight", config.num_heads),
        key_norm=_head_norm_spec(config, f"{attention}.k_norm.weight", config.num_kv_heads),
    )


def _joined_specs(
    prefix: str, names: tuple[str, ...], widths: tuple[int, ...], num_inputs: int, *, bias: bool
) -> tuple[LinearSpec, ...]:
    """A module for each width, or one with the sum of them where there is one name."""
    num_outputs = widths if len(names) == len(widths) else (sum(widths),)
    return tuple(
        LinearSpec(f"{prefix}.{name}", width, num_inputs, bias) for name, width in zip(names, num_outputs, strict=True)
    )


def _head_norm_spec(config: ModelConfig, name: str, num_heads: int) -> NormSpec | None:
    shapes = {
        HeadNorm.EVERY_HEAD: (config.head_dim,),
        HeadNorm.WHOLE_PROJECTION: (num_heads * config.head_dim,),
        HeadNorm.OWN_WEIGHTS: (num_heads, config.head_dim),
    }
    return None if config.head_norm is HeadNorm.NEVER else NormSpec(name, shapes[config.head_norm])


def _mlp_spec(config: ModelConfig, prefix: str, index: int) -> MlpSpec | MoeSpec:
    hidden, moe, family = config.hidden_size, config.moe, config.architecture.moe
    if moe is None or family is None or not moe.sparse_layers[index]:
        mlp, width, bias = f"{prefix}.mlp", config.intermediate_size, config.mlp_bias
        return MlpSpec(
            gate_up=_joined_specs(mlp, config.architecture.gate_up, (width, width), hidden, bias=bias),
            down=LinearSpec(f"{mlp}.down_proj", hidden, width, bias),
        )
    block = f"{prefix}.{family.block}"
    experts = [
        _expert_spec(family, f"{block}.experts.{number}", hidden, moe.intermediate_size)
        for number in range(moe.num_experts)
    ]
    return MoeSpec(
        router=LinearSpec(f"{block}.gate", moe.num_experts, hidden, bias=False),
        experts=tuple(experts),
        shared_expert=None
        if moe.shared_intermediate_size is None
        else SharedExpertSpec(
            _expert_spec(family, f"{block}.shared_expert", hidden, moe.shared_intermediate_size),
            LinearSpec(f"{block}.shared_expert_gate", 1, hidden, bias=False),
        ),
        num_experts_per_tok=moe.num_experts_per_tok,
        norm_topk_prob=moe.norm_topk_prob,
    )


def _expert_spec(family: MoeFamily, name: str, hidden: int, width: int) -> MlpSpec:
    return MlpSpec(
        gate_up=_joined_specs(name, (family.gate, family.up), (width, width), hidden, bias=False),
        down=LinearSpec(f"{name}.{family.down}", hidden, width, bias=False),
    )


def head_spec(config: ModelConfig) -> LinearSpec:
    return LinearSpec(HEAD, config.vocab_size, config.hidden_size, bias=False)


def check_tensors(reader: CheckpointReader, config: ModelConfig) -> None:
    """Check names, shapes and dtypes before anything is loaded.

    Raises CheckpointError naming what is missing, what is left over, or the tensor that is wrong.
    """
    layers = [layer_spec(config, index) for index in range(config.num_layers)]
    linears = [linear for layer in layers for linear in layer.linears]
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    for layer in layers:
        shapes |= {norm.name: norm.shape for norm in layer.norms}
    if not config.tie_word_embeddings or reader.tensor_names_of(HEAD):
        linears.append(head_spec(config))
    packed_names: set[str] = set()
    for linear in linears:
        if linear.bias:
            shapes[f"{linear.name}.bias"] = (linear.num_outputs,)
        if reader.is_quantized(linear.name):
            _check_packed_shape(reader, linear)
            packed_names |= set(reader.packed_tensor_names(linear.name))
        else:
            shapes[f"{linear.name}.weight"] = (linear.num_outputs, linear.num_inputs)
    _check_names(reader, set(shapes) | packed_names)
    for name, shape in shapes.items():
        _check_dense(reader, name, shape)


def _check_names(reader: CheckpointReader, expected: set[str]) -> None:
    present = {name for name in reader.tensor_names if not name.endswith(IGNORED_SUFFIXES)}
    if missing := expected - present:
        raise CheckpointError(
            f"the checkpoint lacks {_list_names(missing)}; fetch it again, or its config is another's"
        )
    if left_over := present - expected:
        raise CheckpointError(
            f"the checkpoint has {_list_names(left_over)}, which a model of its config has no place for"
        )


def _check_packed_shape(reader: CheckpointReader, linear: LinearSpec) -> None:
    shape = reader.packed_spec(linear.name).shape
    if shape != (linear.num_outputs, linear.num_inputs):
        raise CheckpointError(
            f"{linear.name} is quantized with {shape[0]} outputs and {shape[1]} inputs; "
            f"the config asks for {linear.num_outputs} and {linear.num_inputs}"
        )


def _check_dense(reader: CheckpointReader, name: str, shape: tuple[int, ...]) -> None:
    if reader.shape(name) != shape:
        raise CheckpointError(f"{name} has the shape {list(reader.shape(name))}; the config asks for {list(shape)}")
    if reader.dtype(name) not in FLOAT_DTYPES:
        raise CheckpointError(f"{name} is {reader.dtype(name)}; it must be float32, bfloat16 or float16")


def _list_names(names: set[str]) -> str:
    shown = sorted(names)[:MAX_NAMES_IN_MESSAGE]
    others = len(names) - len(shown)
    return ", ".join(shown) + (f" and {others} more" if others else "")
